"""What a search shows: the terminal, the report page, pictures of token plans."""
