"""Jobs that commands and searches share: score, prune and finetune a model, in this process or on Ray."""
