"""``python -m memo_runtime`` is ``memo``."""

from memo_runtime.cli.app import main

if __name__ == "__main__":
    main()
