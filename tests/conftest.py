"Learners that the tests share: real data from scikit-learn, a few hundred parameters, a second to train."
import functools, os
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest
from fastai.basics import *
from fastai.callback.all import *
from fastai_bs_finder.all import *
from fastai_bs_finder.recorder import BSRecorder, Search
from fastai_bs_finder.profile import Profile
from fastai_bs_finder.finder import EndSearch
from fastai_bs_finder.suggest import critical, efficient, fastest, fits
from fastai_bs_finder.stats import noise_scale
from sklearn.datasets import load_digits
for o in [o for o in globals() if o.startswith('test')]: del globals()[o] # fastcore's `test_eq` and the like are no tests of ours

torch.optim.AdamW([nn.Parameter(torch.ones(1))]) # what PyTorch imports for its first optimizer may draw random numbers, once
torch.set_num_threads(1) # on models this small, threads only wait for each other

@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')

@functools.cache
def digits(): return [(Tensor(o).view(1,8,8)/16, TensorCategory(t)) for o,t in zip(*load_digits(return_X_y=True))]

def make_learner(path='.', seed=0, bs=64, num_workers=0, opt_func=Adam, **kwargs):
    "Digits, with everything that a search could disturb: batch norm, dropout, a shuffled loader"
    set_seed(seed)
    ds = digits()
    dls = DataLoaders.from_dsets(ds[:1437], ds[1437:], bs=bs, num_workers=num_workers, shuffle=True, drop_last=True, device='cpu', path=path)
    model = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(.2), nn.Linear(128,10))
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, path=path, **kwargs)
    return learn.remove_cb(ProgressCallback)

@pytest.fixture
def learn(tmp_path): return make_learner(tmp_path)

def limited(num_it, **kwargs):
    "A finder, and what ends its fit after `num_it` batches"
    finder = BSFinder(**kwargs)
    return finder,EndSearch(finder, num_it)
