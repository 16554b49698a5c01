"""FedDIP over MPI: federated training with dynamic pruning and error feedback."""

__version__ = "0.1.0"
