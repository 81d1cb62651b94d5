"`python -m dreamplus` is the command `dreamplus`."
import sys

from .cli import main

if __name__ == '__main__': sys.exit(main())
