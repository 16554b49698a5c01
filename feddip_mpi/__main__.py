"""`python -m feddip_mpi`."""

from feddip_mpi.cli import main

if __name__ == "__main__":
    main()
