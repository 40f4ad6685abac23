"""``python -m prunesweep``: the command line."""

from prunesweep.launch.cli import main

if __name__ == "__main__":
    main()
