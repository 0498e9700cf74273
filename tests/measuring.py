"Small learners, and the exact noise and scale that a search has to find."
import math, random, tempfile
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import params, set_seed
from torch import nn
from fastai_bs_finder.all import *
from helpers import digits, weights

methods = ['accumulate','split'] # those that are meant for users, and unbiased
pieces = dict(split=4) # into how many micro-batches a method cuts a batch, if it does
each_method = pytest.mark.parametrize('method', methods)
each_method_in_ci = pytest.mark.parametrize('method', ['accumulate', pytest.param('split', marks=pytest.mark.slow)])
drowned_is_fine = pytest.mark.filterwarnings('ignore:The gradient drowned') # which so few batches may bring about

# --- small learners

def biased(m): m.bias.data[0] += 2; return m # far from the optimum, for a gradient that is not drowned in noise

def net(): return nn.Sequential(nn.Flatten(), biased(nn.Linear(64,10)))

def deep(): return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), biased(nn.Linear(16,10)))

def halves(m): return [params(m[:2]), params(m[2:])]

def torch_opt(opt, **kwargs): return partial(OptimWrapper, opt=opt, **kwargs)

def learner(model=net, loss=None, items=None, bs=8, n_inp=1, drop_last=True, **kwargs):
    "128 digits in 16 batches of 8"
    set_seed(0)
    items = digits()[:128] if items is None else items
    dls = DataLoaders.from_dsets(items, items[:16], bs=bs, num_workers=0, shuffle=True, drop_last=drop_last, device='cpu')
    dls.n_inp = n_inp
    kwargs = dict(path=tempfile.gettempdir(), opt_func=Adam) | kwargs
    return Learner(dls, model(), loss or CrossEntropyLossFlat(), **kwargs).remove_cb(ProgressCallback)

# --- what a search says

def enough(method, n=320):
    "Batches; of those that are cut half as many are as precise"
    return n//2 if method=='split' else n

def measure(learn, method='accumulate', num_it=None, n_batch=8, lr=1e-12, **kwargs):
    "Search, by default at weights that stand still; check what holds for every search; noise and scale over all batches"
    kwargs,num_it = dict(beta=1, n_batch=n_batch) | kwargs,num_it or enough(method)
    n_batch = kwargs['n_batch']
    before,opt,fs,cbs = weights(learn),learn.opt,learn.loss_func,list(learn.cbs)
    learn.bs_find(lr, num_it=num_it, method=method, show_plot=False, suggest_funcs=None, **kwargs)
    rec,after = learn.recorder,learn.model.state_dict()
    assert list(before)==list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert learn.opt is opt and learn.loss_func is fs and list(learn.cbs)==cbs
    assert not any(p._backward_hooks for p in learn.model.parameters())
    assert len(rec.noise)==len(rec.scale)==len(rec.noise_scale)==len(rec.bs_find_stats)==num_it//n_batch
    assert rec.search.n_iter[-1]==num_it
    assert all(map(math.isfinite, rec.noise+rec.scale)) and min(rec.noise) > 0
    return rec.noise[-1],rec.scale[-1]

def stats(learn, method='accumulate', num_it=32, **kwargs):
    measure(learn, method, num_it, **kwargs)
    return learn.recorder.bs_find_stats

def assert_same(a, b, rtol=1e-5): pd.testing.assert_frame_equal(a, b, rtol=rtol, check_exact=False)

# --- what is right

def trainable(model): return [p for p in model.parameters() if p.requires_grad]

def flat(grads, ps):
    "All gradients in one row, zeros where there is none"
    return torch.cat([torch.zeros(p.numel()) if g is None else g.detach().float().flatten() for g,p in zip(grads, ps)]).double()

def singles(learn):
    "The gradient of each training item, a row each"
    dl,ps,rows = learn.dls.train,trainable(learn.model),[]
    if not isinstance(dl, DataLoader): dl = DataLoader(dl.dataset, num_workers=0)
    for b in dl.new(bs=1, shuffle=False, drop_last=False):
        learn._split(b)
        loss = learn.loss_func(learn.model.train()(*learn.xb), *learn.yb)
        rows.append(flat(torch.autograd.grad(loss, ps, allow_unused=True), ps))
    learn._end_cleanup()
    return torch.stack(rows)

def exact(learn, weight=None, replace=False):
    "Noise and scale of the whole training set; drawn without replacement, batches see a scale that is less by noise/n"
    g = singles(learn)
    if weight is not None: # the loss is a weighted mean: by its derivative at the mean gradient
        weight = weight/weight.mean()
        mean = (weight[:,None]*g).mean(0)
        g = mean + weight[:,None]*(g-mean)
    n,mean = len(g),g.mean(0).square().sum()
    noise = g.square().sum(1).mean()-mean
    if not replace: noise,mean = noise*n/(n-1),mean-noise/(n-1)
    return noise.item(),mean.item()

class Grads(Callback):
    "The gradient of each batch of an ordinary training"
    def before_fit(self): self.all = []
    def before_step(self): self.all.append(flat([p.grad for p in trainable(self.model)], trainable(self.model)))

def by_batches(learn, epochs=30):
    "Noise and scale from the scatter of ordinary batches' gradients, where chance plays a part in single examples too"
    grads,n,bs = Grads(),learn.dls.train.n,learn.dls.train.bs
    with learn.no_logging(): learn.fit(epochs, 1e-12, cbs=grads)
    g = torch.stack(grads.all).view(epochs, n//bs, -1)
    noise = bs*g.var(1).sum(-1).mean()
    return noise.item(),(g.mean(1).square().sum(-1).mean()-noise/n).item()

def assert_close(got, want, tol=.1):
    for nm,a,b in zip(('noise','scale'), got, want):
        assert abs(a/b-1) < tol, f'{nm} {a:.4g} instead of {b:.4g}: {a/b-1:+.1%}'

def assert_far(a, b, tol=.2):
    assert any(abs(o/p-1) > tol for o,p in zip(a, b)), f'{a} and {b} are too much alike for the test to tell'

# --- what is watched

def trained(make, cbs=(), epochs=2, monitor=None, seed=0):
    "All that a training leaves behind"
    set_seed(seed, reproducible=True)
    learn = make()
    learn.add_cbs([o() for o in cbs])
    learn.dls.train.rng = random.Random(seed)
    with learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=monitor)
    chance = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist(),learn.dls.train.rng.getstate()
    n = len(learn.recorder.metrics)+2
    return learn,dict(
        weights=dict(learn.model.state_dict()), opt=learn.opt.state_dict(), losses=learn.recorder.losses, lrs=learn.recorder.lrs,
        values=[list(o)[:n] for o in learn.recorder.values], chance=chance)

def standing(make=learner, cbs=(), n=30, every=1, **kwargs):
    "Noise and scale, averaged over epochs at weights that stand still"
    learn,monitor = make(**kwargs),NoiseScaleMonitor(every=every)
    monitor.running.most = math.inf
    monitor.running.add = lambda *row: monitor.running.rows.append(row) or setattr(monitor.running, 'n', 1)
    with learn.no_logging(): learn.fit(n, 1e-12, cbs=[monitor, *cbs])
    rows = np.array(monitor.running.rows)
    return learn,tuple(np.average(rows[:,1:3], axis=0, weights=rows[:,3]))
