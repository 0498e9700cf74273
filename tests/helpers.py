"Learners and searches that the tests share: real data from scikit-learn, a few hundred parameters, a second to train."
import functools, multiprocessing
from pathlib import Path

import numpy as np, pandas as pd, torch
from torch import Tensor, nn
from sklearn.datasets import load_digits
from fastcore.foundation import L
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import TensorCategory, set_seed
from fastai_bs_finder.all import *
from fastai_bs_finder.finder import EndSearch

forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['fastai_bs_finder.all','fastai.distributed']) # or each process would import for ten seconds

# --- learners

@functools.cache
def digits(): return [(Tensor(o).view(1,8,8)/16, TensorCategory(t)) for o,t in zip(*load_digits(return_X_y=True))]

def loaders(n=1437, bs=64, **kwargs):
    kwargs = dict(num_workers=0, shuffle=True, drop_last=True, device='cpu') | kwargs
    return DataLoaders.from_dsets(digits()[:n], digits()[1437:], bs=bs, **kwargs)

def make_learner(path='.', seed=0, bs=64, num_workers=0, opt_func=Adam, **kwargs):
    "Digits, with everything that a search could disturb: batch norm, dropout, a shuffled loader"
    set_seed(seed)
    dls = loaders(bs=bs, num_workers=num_workers, path=path)
    model = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                          nn.Flatten(), nn.Dropout(.2), nn.Linear(128,10))
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, path=path, **kwargs).remove_cb(ProgressCallback)

def plain_learner(bs=64, n=1437, model=None, loss=None, **kwargs):
    "Without batch norm and dropout, so that a batch is the sum of its parts"
    set_seed(0)
    dls = loaders(n, bs)
    layers = nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128,10)
    return Learner(dls, model or nn.Sequential(*layers), loss or CrossEntropyLossFlat(), **kwargs).remove_cb(ProgressCallback)

class Stream(torch.utils.data.IterableDataset):
    "Items one after the other, number unknown"
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)

def small_table(n=160):
    "Two numbers, one of them at times missing, a category, and a class that depends on them"
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(n), b=rng.randn(n), kind=rng.choice(list('uvw'), n)))
    df['y'] = np.where(df.a+df.b+(df.kind=='u')+.5*rng.randn(n) > 0, 'yes', 'no')
    df.loc[::7,'b'] = np.nan
    return df

# --- searches

def search(learn, **kwargs):
    "A short search"
    return learn.bs_find(**dict(lr=1e-2, num_it=30, n_batch=10, show_plot=False, suggest_funcs=BSSuggestion.Critical) | kwargs)

def limited(num_it, **kwargs):
    "A finder for an ordinary fit, and what ends that after `num_it` batches"
    finder = BSFinder(**kwargs)
    return finder,EndSearch(finder, num_it)

# --- what was and what is

def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

def same(a, b):
    "Equal to the last bit, in tensors, dictionaries and lists as deep as you like"
    if isinstance(a, Tensor) and a.is_sparse: a,b = a.to_dense(),b.to_dense()
    if isinstance(a, Tensor): return a.dtype==b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return list(a)==list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,L)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

def disk(path):
    "All files below `path`, with their times and contents"
    return {o: (o.stat().st_mtime_ns, o.read_bytes() if o.is_file() else None) for o in sorted(Path(path).rglob('*'))}
