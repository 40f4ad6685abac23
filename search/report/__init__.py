"""The output of a search for people: the terminal, the report page, pictures of token plans."""
