"""`python -m mono_internvl` is `mono-internvl`."""

from mono_internvl.cli.app import main

if __name__ == "__main__":
    main()
