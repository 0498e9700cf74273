"What holds for all tests: no screen, one thread, no figure left open, quick garbage collections."
import gc, os
os.environ.setdefault('MPLBACKEND', 'Agg')

import matplotlib.pyplot as plt, pytest, torch
from helpers import make_learner

torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]) # what PyTorch imports for its first optimizer may draw random numbers
torch.set_num_threads(1) # on models this small, threads only wait for each other

def pytest_addoption(parser):
    parser.addoption('--every-line', action='store_true', help='interrupt at each line of saving and restoring; takes half an hour')

@pytest.fixture(autouse=True, scope='session')
def quick_collections():
    "Each size of a profile collects garbage, which takes a quarter of a second if it goes through all modules every time"
    gc.collect()
    gc.freeze()

@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')

@pytest.fixture
def learn(tmp_path): return make_learner(tmp_path)
