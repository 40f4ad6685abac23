"""What the commands for clusters are made of: the job API, what is shipped, what runs there, and manifests."""
