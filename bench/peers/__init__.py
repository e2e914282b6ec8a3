"""The same database work through other queues and schedulers, in an environment of their own (`make bench-peers`)."""
