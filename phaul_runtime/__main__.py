"""`python -m phaul_runtime` is the command line."""

from phaul_runtime.cli.main import main

if __name__ == "__main__":
    main()
