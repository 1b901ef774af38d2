"""``python -m miepo``."""

from miepo.cli.command import main

if __name__ == "__main__":
    main()
