"""Run ``python -m pertcast`` as ``pertcast``."""

from pertcast.cli.app import main

if __name__ == "__main__":
    main()
