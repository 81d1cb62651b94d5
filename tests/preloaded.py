"What the server of `processes` has in memory before it forks: modules, and the arguments of all parts"
import sys
from pathlib import Path

import matplotlib.pyplot # noqa: F401
import pytest # noqa: F401
import sklearn.datasets
import sklearn.model_selection # noqa: F401
import torch._dynamo # noqa: F401, which any optimiser imports
import torch.distributed.run # noqa: F401

import dreamplus.all
import dreamplus.judge.sets # noqa: F401
from dreamplus.arguments import arguments
from dreamplus.parts import all_parts

sys.path.insert(0, str(Path(__file__).parent)) # where the tests find `processes`
import processes # noqa: E402, F401, with the command line and all notebooks

for part in all_parts().values(): arguments(part) # reads the source of each part
