"""`python -m rlprune` is the command `rlprune`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
