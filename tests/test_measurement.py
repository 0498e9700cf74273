"What a measurement costs, what it counts in, and how sure it is."
import math
from contextlib import ExitStack
from unittest.mock import patch as mock_patch

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from fastai_bs_finder.all import BSFinder
from helpers import limited, make_learner, plain_learner, search
from fastai_bs_finder.gradients import estimators

# --- nothing waits for the device

class Scalars(TorchDispatchMode):
    "Counts how often a number is taken out of a tensor"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

def waits(f):
    "Numbers taken out one at a time, lists of them, and whole tensors fetched"
    n = dict.fromkeys(('tolist','cpu','numpy'), 0)
    def counting(nm, orig):
        def _f(self, *args, **kwargs): n[nm] += 1; return orig(self, *args, **kwargs)
        return _f
    with Scalars() as scalars, ExitStack() as stack:
        for nm in n: stack.enter_context(mock_patch.object(Tensor, nm, counting(nm, getattr(Tensor, nm))))
        f()
    return scalars.n,n['tolist'],n['cpu']+n['numpy']

def can_watch():
    "PyTorch's watch over operations could not see through subclasses of tensors before 2.6"
    class Sub(Tensor): pass
    try:
        with Scalars(): torch.ones(2).as_subclass(Sub)
        return True
    except RuntimeError: return False

watched = pytest.mark.skipif(not can_watch(), reason="this PyTorch can't watch subclasses of tensors")

@watched
@pytest.mark.parametrize('method', sorted(estimators.keys()-{'distributed'})) # which one process can't have
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(reduction='sum')], ids=['mean','sum'])
def test_waits_for_the_device_once_a_measurement(method, loss):
    "A loader of tensors that takes none out itself: four times as many batches, as many measurements, as many waits"
    def n(num_it, n_batch):
        learn = plain_learner(loss=loss)
        xs,ys = (torch.stack(o).as_subclass(Tensor) for o in zip(*learn.dls.train.dataset)) # a subclass takes lists twice
        class Batches:
            dataset = learn.dls.train.dataset
            def __len__(self): return 20
            def __iter__(self): return iter([(xs[i*64:i*64+64],ys[i*64:i*64+64]) for i in range(20)])
        learn.dls.loaders[0] = Batches()
        return waits(lambda: search(learn, num_it=num_it, n_batch=n_batch, method=method))
    few,many = n(10, 5),n(40, 20)
    assert few==many and many[0] <= 8 # the trials of the optimizer, of the loss and of the model, once
    assert many[1] <= 3+16*(method=='split') # and 'split' asks of its first 16 parts whether the loss is the mean of theirs

@watched
def test_waits_are_counted():
    "What the test above is worth"
    t = torch.ones(3)
    assert waits(lambda: (t.sum().item(), bool(t[0] > 0), float(t[1]), t.tolist(), t.cpu(), t.numpy()))==(3,1,2)
    class Impatient(Callback):
        def before_step(self): self.learn.loss.item()
    learn = plain_learner()
    learn.add_cb(Impatient())
    assert waits(lambda: search(learn, num_it=40))[0] >= 40

# --- how sure

def test_interval_is_around_the_noise_scale(learn):
    search(learn, num_it=100, beta=1)
    df = learn.recorder.bs_find_stats
    assert list(df)==['noise','scale','noise_scale','lower','upper'] and df.upper.iloc[0]==math.inf and df.lower.iloc[0]==0
    seen = df[df.noise_scale < math.inf].iloc[4:]
    assert len(seen) and (seen.lower < seen.noise_scale).all() and (seen.noise_scale < seen.upper).all()
    assert seen.upper.iloc[-1] < math.inf

def test_tol_ends_the_search():
    "As soon as the interval is narrow enough, not before there are ten measurements, and at the latest after `num_it`"
    ends = {}
    for tol in (.15,.25,.9):
        learn = plain_learner()
        search(learn, lr=1e-12, num_it=400, tol=tol)
        df = learn.recorder.bs_find_stats
        ok = (df.lower >= (1-tol)*df.noise_scale) & (df.upper <= (1+tol)*df.noise_scale)
        assert ok.iloc[-1] and not ok.iloc[9:-1].any()
        ends[tol] = df.index[-1]
    assert 100 <= ends[.9] <= ends[.25] < ends[.15] < 400
    search(learn, lr=1e-12, num_it=120, tol=.01)
    assert learn.recorder.search.n_iter[-1]==120

@pytest.mark.parametrize('method', ['accumulate','split'])
def test_beta_means_the_same_for_every_n_batch(method):
    "An average's reach in batches: measurements of 5 batches weigh beta**5 less each, those of 20 beta**20"
    for n_batch in (5,20):
        learn,(finder,end) = plain_learner(),limited(100, n_batch=n_batch, beta=.97, method=method)
        with learn.no_logging(): learn.fit(5, 1e-3, cbs=[finder,end])
        raw = np.array([r[1] for r in finder.running.rows])
        w = .97**(n_batch*np.arange(len(raw))[::-1])
        assert len(raw)==100//n_batch and np.isclose(learn.recorder.noise[-1], (w*raw).sum()/w.sum(), rtol=1e-4)

# --- sequences and tokens

class CharLM(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.head = nn.Embedding(20,8),nn.Linear(8,20)
    def forward(self, x): return self.head(self.emb(x))

class Stateful(CharLM):
    def reset(self): pass

def lm_learner(model):
    set_seed(0)
    ids = torch.randint(0, 20, (256,13))
    items = list(zip(ids[:,:-1], ids[:,1:]))
    dls = DataLoaders.from_dsets(items, items[:16], bs=16, shuffle=True, drop_last=True, num_workers=0, device='cpu')
    return Learner(dls, model, CrossEntropyLossFlat()).remove_cb(ProgressCallback)

def test_language_models_count_sequences_and_tokens():
    learn = lm_learner(CharLM())
    search(learn)
    df = learn.recorder.bs_find_stats
    assert learn.recorder.search.n_tokens==12 and np.allclose(df.tokens, 12*df.noise_scale)
    assert 'sequences of 12 tokens' in learn.recorder.bs_find_summary()
    fig = learn.recorder.plot_bs_find(return_fig=True)
    assert 'sequences of 12 tokens' in fig.axes[0].get_ylabel()

def test_no_tokens_elsewhere(learn):
    search(learn)
    assert learn.recorder.search.n_tokens is None and 'tokens' not in learn.recorder.bs_find_stats
    assert 'sequences' not in learn.recorder.bs_find_summary()

def test_split_and_a_hidden_state():
    with pytest.warns(UserWarning, match='carries its hidden state'): search(lm_learner(Stateful()), method='split')

# --- what is recorded

def test_facts_of_a_search(tmp_path):
    "The recorder knows what it was measured with"
    learn = make_learner(tmp_path, opt_func=SGD)
    learn.bs_find(.03, bs=32, num_it=40, show_plot=False, suggest_funcs=None)
    rec = learn.recorder
    assert (
        rec.search.train_bs, rec.search.bs, rec.search.lr, rec.search.adaptive,
        rec.search.batch_norm)==(64, 32, .03, False, True)
    assert np.isclose(rec.bs_table().lr[32], .03)
    learn = make_learner(tmp_path)
    learn.bs_find(slice(1e-4,1e-3), num_it=40, show_plot=False, suggest_funcs=None)
    table = learn.recorder.bs_table()
    assert learn.recorder.search.adaptive and table.lr[64]==slice(1e-4,1e-3) and '0.0001 to 0.001' in repr(table)

def test_schedule(tmp_path):
    "The learning rate that a watched training's batch size goes with is the peak of its schedule"
    learn = make_learner(tmp_path)
    with learn.no_logging(): learn.fit_one_cycle(1, 3e-2, cbs=BSFinder(n_batch=2))
    assert .02 < learn.recorder.search.lr <= 3e-2
