"Where things are, where random numbers begin; and a cache of our own, so that no test touches the user's."
import gc

import pytest
import torch
from notebooks import ROOT

def pytest_collection_finish():
    "Collections of garbage, and the end, pass over the million objects of torch: 20 seconds less"
    gc.freeze()

@pytest.fixture(autouse=True)
def seed():
    "A test alone draws the numbers that it draws among the others"
    torch.default_generator.manual_seed(0) # that of the CPU only: `torch.manual_seed` takes 3 ms for the other devices

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def shared_data(root):
    "The real data that lies beside a developer's checkout, read-only"
    path = root.parent/'shared'/'data'
    if not path.is_dir(): pytest.skip('needs the real data in ../shared/data, which is not here')
    return path

@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DREAMPLUS_CACHE', str(path))
        yield path
