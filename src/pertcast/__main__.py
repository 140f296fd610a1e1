"""``python -m pertcast`` is ``pertcast``."""

from pertcast.cli.main import main

if __name__ == "__main__":
    main()
