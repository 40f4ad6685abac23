"""A search on disk: the run's folder, Optuna's study, the Pareto front."""
