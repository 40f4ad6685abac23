"""Parts of the commands for clusters: the job API, the shipped package, the modules run there, and manifests."""
