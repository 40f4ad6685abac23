"""Running a search: the driver, the coordinator, Ray, and one task of training and evaluation."""
