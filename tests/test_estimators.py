"What each estimator makes of a training, which one is chosen, and what a new one takes."
import math, pickle, warnings

import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, SGD
from fastai.torch_core import set_seed
from torch import nn, Tensor, tensor
from torch.nn import functional as F
from fastai_bs_finder.all import BSFinder
from fastai_bs_finder.gradients import Estimator, estimators, get_estimator, sq_norm
from fastai_bs_finder.stats import noise_and_scale
from helpers import digits, limited, plain_learner, same, search, weights
from measuring import by_batches, deep, Grads, learner, measure, singles

# --- the optimizer's steps

@pytest.mark.parametrize('opt', [SGD, Adam], ids=['SGD','Adam'])
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), CrossEntropyLossFlat(reduction='sum')], ids=['mean','sum'])
@pytest.mark.parametrize('bs', [64,30])
def test_split_steps_as_normal_training_does(opt, loss, bs):
    "The same weights after as many batches, also where micro-batches differ in size and where the loss is a sum"
    plain,split = (plain_learner(bs, loss=loss, opt_func=opt) for _ in range(2))
    for learn,cbs in ((plain,None), (split,BSFinder(method='split', n_batch=5))):
        with learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
    for a,b,start in zip(plain.model.parameters(), split.model.parameters(), plain_learner(bs).model.parameters()):
        assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, start, atol=1e-4)
    assert split.recorder.search.n_iter==list(range(5, len(split.dls.train)+1, 5))

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), CrossEntropyLossFlat(reduction='sum')], ids=['mean','sum'])
def test_accumulate_steps_with_the_gradient_of_one_batch(loss):
    "The step of a window is as long as the step of a batch of the usual size, for a sum too"
    def step(bs, n_batch):
        learn,steps = plain_learner(bs, loss=loss, opt_func=SGD),[]
        class Step(Callback):
            order = 100
            def before_step(self): steps.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]))
        with learn.no_logging():
            learn.fit(1, 1e-12, cbs=[Step()] + list(limited(20, n_batch=n_batch, method='accumulate') if n_batch else []))
        return torch.stack(steps)
    whole,windows = step(64, None),step(64, 10)
    assert len(whole)==22 and len(windows)==2
    assert torch.allclose(windows[0], whole[:10].mean(0), rtol=1e-3, atol=1e-5*whole.abs().max())

def test_k_is_the_number_of_micro_batches():
    sizes = []
    learn = plain_learner()
    class Sizes(Callback):
        def before_batch(self): sizes.append(len(self.xb[0]))
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[*limited(3, method='split', k=5), Sizes()])
    assert sizes==[12,13,13,13,13]*3

def test_split_keeps_the_schedule():
    "A one-cycle training with the last batch short: rates, weights and progress go by whole batches"
    def run(*cbs):
        learn,lrs = plain_learner(opt_func=SGD),[]
        learn.dls.loaders[0] = learn.dls.train.new(drop_last=False, bs=60)
        class Rates(Callback):
            order = 100
            def before_step(self): lrs.append((self.opt.hypers[-1]['lr'], self.train_iter))
        with learn.no_logging(): learn.fit_one_cycle(2, .1, cbs=[Rates(), *cbs])
        return lrs,learn.pct_train,torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    (lrs,pct,weights),(lrs2,pct2,weights2) = run(),run(BSFinder(method='split'))
    assert np.allclose(lrs, lrs2) and np.isclose(pct, pct2) and torch.allclose(weights, weights2, atol=1e-4)

# --- batches that were cancelled

class CancelAt(Callback):
    "Skip the rest of the batch in the `n`th `event`; before the backward pass, only that"
    def __init__(self, event, n):
        self.n,self.seen,self.error = n,0,CancelBackwardException if event=='before_backward' else CancelBatchException
        setattr(self, event, self.cancel)
    def cancel(self):
        self.seen += 1
        if self.seen==self.n: raise self.error()

cancels = pytest.mark.parametrize('event', ['after_loss','before_backward','after_backward'])

@cancels
def test_cancelled_micro_batch(event):
    "The parts of a batch that was given up half-way are in no step"
    def steps(*cbs):
        learn,res = plain_learner(opt_func=SGD),[]
        class Step(Callback):
            order = 100
            def before_step(self): res.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]))
        with learn.no_logging(): learn.fit(1, 1e-12, cbs=[Step(), BSFinder(method='split'), *cbs])
        return torch.stack(res), learn.recorder.search.n_iter
    (whole,n),(cut,n2) = steps(),steps(CancelAt(event, 7)) # the third part of the second batch
    assert torch.allclose(cut, torch.cat([whole[:1],whole[2:]]), atol=1e-6) and n2==n

@cancels
def test_cancelled_batch_of_a_window(event):
    "A batch that was given up is in no measurement"
    def recorded(first, *cbs):
        learn = plain_learner()
        learn.dls.loaders[0] = learn.dls.train.new(shuffle=False, dataset=learn.dls.train.dataset[first:])
        with learn.no_logging(): learn.fit(1, 1e-12, cbs=[BSFinder(method='accumulate', n_batch=2, beta=1), *cbs])
        return learn.recorder.noise[-1], learn.recorder.scale[-1]
    assert recorded(0, CancelAt(event, 1))==pytest.approx(recorded(64), rel=1e-4)

@pytest.mark.parametrize('event', ['before_step','after_backward'])
def test_callback_that_changes_gradients_early(event):
    "It gets a warning, unless it says that it comes later"
    class Clip(Callback):
        def clip(self): nn.utils.clip_grad_norm_(self.model.parameters(), .1)
    setattr(Clip, event, Clip.clip)
    with pytest.warns(UserWarning, match="Clip comes between the backward pass and BSFinder.*with an `order` above 6"):
        search(plain_learner(cbs=Clip()))
    if event=='before_step':
        Clip.order = 7
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            search(plain_learner(cbs=Clip()))

# --- which one

def uncuttable(**kwargs):
    "A learner whose batches have a tensor without examples"
    def create_batch(items): return *(torch.stack(o) for o in zip(*items)),tensor(1.)
    learn = plain_learner(**kwargs)
    learn.dls.loaders[0] = learn.dls.train.new(create_batch=create_batch)
    learn.dls.n_inp,learn.loss_func = 1,lambda p,y,w: F.cross_entropy(p, y.as_subclass(Tensor))*w
    return learn

def test_batches_that_cannot_be_cut():
    learn = uncuttable()
    with pytest.raises(ValueError, match=r"got first dimensions \[64, 64, 0\] for 64 items. Use method='accumulate'"):
        search(learn, method='split')
    assert search(learn) is not None

@pytest.mark.filterwarnings('ignore:A window of', 'ignore:The noise scale may be far off', 'ignore:The gradient drowned')
def test_auto_measures_batches_that_cannot_be_cut():
    "It would cut them, as the windows are larger than half of the data, and holds the weights instead"
    def measured(method):
        learn = uncuttable(n=256)
        search(learn, method=method, num_it=40)
        return learn.recorder.bs_find_stats
    auto,accumulate = measured('auto'),measured('accumulate')
    assert len(auto) >= len(accumulate)-1
    assert np.allclose(auto.noise.iloc[-1], accumulate.noise.iloc[-1], rtol=.3)

@pytest.mark.parametrize('method', sorted(estimators.keys()-{'distributed'})) # which one process can't have
def test_nothing_of_the_data_stays_in_an_estimator(method):
    "An exported learner that has a finder among its callbacks would carry it along"
    finder = BSFinder(method=method)
    with (learn := plain_learner()).no_logging(): learn.fit(1, 1e-3, cbs=finder)
    assert len(pickle.dumps(finder.estimator)) < 2000

def test_auto_cuts_such_small_data():
    "What the test above is worth"
    learn,sizes = plain_learner(n=256),[]
    class Sizes(Callback):
        def before_batch(self): sizes.append(len(self.yb[0]))
    learn.add_cb(Sizes())
    search(learn)
    assert set(sizes)=={16}

def test_auto_cuts_batches_where_windows_exceed_the_data():
    "128 items in batches of 32: a window of 10 batches would hold each of them more than twice"
    def sizes(learn):
        seen = []
        learn.model.register_forward_pre_hook(lambda m,x: seen.append(len(x[0])) if m.training else None)
        search(learn)
        return set(seen)
    assert sizes(plain_learner(32, n=128))=={8} and sizes(plain_learner(32))=={32}

# --- gradients of single examples

@pytest.mark.parametrize('method', ['per_example','split'])
def test_agrees_with_whole_batches(method):
    "At weights that stand still, over ten epochs: the same examples in batches of 64 and, one at a time or in parts, within them"
    def measured(method):
        learn = plain_learner()
        search(learn, lr=1e-12, num_it=220, beta=1, method=method)
        return np.array([learn.recorder.noise[-1], learn.recorder.scale[-1]])
    assert np.allclose(measured(method)/measured('accumulate'), 1, atol=.05)

def test_per_example_names_batch_norm(learn):
    with pytest.raises(ValueError, match="batch norm ties those of a batch together, in 1. Use method='accumulate'"):
        search(learn, method='per_example')

def test_per_example_says_what_it_cannot_do():
    "Models and losses that look at numbers; mixed precision, which scales its loss"
    learn = plain_learner(loss=lambda p,y: F.cross_entropy(p, y.as_subclass(Tensor)) if p.sum() > 0 else p.sum())
    with pytest.raises(RuntimeError, match="(?s)single examples of this model and loss.*Use method='accumulate'"):
        search(learn, method='per_example')
    learn = plain_learner()
    for cb in (MixedPrecision(), MixUp()):
        with pytest.raises(ValueError, match=f"per_example.*{type(cb).__name__}.*Use method='accumulate'"), learn.added_cbs(cb):
            search(learn, method='per_example')

@pytest.mark.parametrize('loss', [
    CrossEntropyLossFlat(weight=torch.linspace(.2,4,10)),
    CrossEntropyLossFlat(ignore_index=0)], ids=['weight','ignore_index'])
def test_per_example_refuses_losses_that_are_no_mean(loss):
    with pytest.raises(ValueError, match="the mean of the losses of single examples.*Use method='accumulate'"):
        search(plain_learner(loss=loss), method='per_example')

# --- sums of absolute values

def frozen_half():
    res = deep()
    res[1].requires_grad_(False)
    return res

def l1_learner(**kwargs): return learner(items=digits()[:1024], **kwargs)

@pytest.mark.parametrize('kwargs', [
    dict(), dict(loss=CrossEntropyLossFlat(reduction='sum')), dict(bs=15), dict(model=frozen_half), dict(model=deep)])
def test_l1_is_right(kwargs):
    "Both sums, against the gradients of single items; batches that differ in size, sums, frozen layers"
    kwargs = dict(bs=16, drop_last=False) | kwargs
    learn = l1_learner(**kwargs)
    got = measure(learn, 'l1', num_it=640, n_batch=20)
    g = singles(l1_learner(**{k: v for k,v in kwargs.items() if k!='loss'}))
    assert np.allclose(np.divide(got, [g.std(0).sum()**2,g.mean(0).abs().sum()**2]), 1, atol=.1)

# --- a new one

class Signs(Estimator):
    "Compare the signs of each batch's gradient with their mean, and step on every batch"
    name = 'signs'
    def add_small(self, bs, xb, yb):
        signs = [bs*g.sign() for g in self.grads()]
        self.sums = signs if self.n==1 else [a+b for a,b in zip(self.sums, signs)]
        self.small,self.step_now = self.small+sq_norm(signs)/bs,True
    def big(self): return sq_norm(self.sums)/self.size**2

@pytest.mark.parametrize('how', ['object','name'])
def test_new_estimator_is_one_class(how, monkeypatch):
    "No other room knows it: it is given to `bs_find`, or put among the others under its name"
    monkeypatch.setitem(estimators, 'signs', Signs)
    learn,twin,grads = plain_learner(),plain_learner(),Grads()
    search(learn, lr=1e-12, method=Signs(10) if how=='object' else 'signs', num_it=20, n_batch=10, beta=1)
    with twin.no_logging(): twin.fit(1, 1e-12, cbs=grads)
    windows = torch.stack(grads.all[:20]).sign().view(2, 10, -1)
    small,big = windows.square().sum(-1).mean(1),windows.mean(1).square().sum(-1)
    expected = [noise_and_scale(s, b, 64, 640) for s,b in zip(small.tolist(), big.tolist())]
    assert np.allclose(np.mean(expected, 0), [learn.recorder.noise[-1], learn.recorder.scale[-1]], rtol=1e-4)

def test_options_go_to_those_that_have_them():
    "By name: none but the estimator knows which these are"
    def created(name, **kwargs): return get_estimator(name, nn.Linear(2,2), 100, 64, **kwargs)
    assert created('split', n_batch=7, k=3).k==3 and created('accumulate', n_batch=7, k=3).n_window==7
    assert created('per_example', n_batch=7, k=3, n_floats=10).n_floats==10

# --- models and losses that need whole batches, on data so small that 'auto' would cut them

class FixedState(nn.Module):
    "A hidden state for batches of 64"
    def __init__(self): super().__init__(); self.lin,self.h = nn.Linear(64,10),torch.zeros(64,10)
    def forward(self, x): return self.lin(x.flatten(1)) + self.h

class KeptState(nn.Module):
    "A hidden state that goes from batch to batch, without a `reset`"
    def __init__(self): super().__init__(); self.lin,self.h = nn.Linear(64,10),None
    def forward(self, x):
        self.h = self.lin(x.flatten(1)) + (0 if self.h is None else .1*self.h)
        h,self.h = self.h,self.h.detach()
        return h

def fixed_loss(pred, y): return (F.cross_entropy(pred, y, reduction='none').view(64)*torch.linspace(.5, 1.5, 64)).mean()

whole_only = dict(state=(FixedState, None), kept=(KeptState, None), loss=(None, fixed_loss))

@pytest.mark.parametrize('nm', whole_only)
def test_auto_falls_back_to_whole_batches(nm):
    "It measures all the same, and says so"
    def make():
        set_seed(0)
        model,loss = whole_only[nm]
        learn = plain_learner(n=256, model=model and model(), loss=loss)
        learn.dls.train.shuffle = True
        return learn
    learn = make()
    before = weights(learn)
    with pytest.warns(UserWarning, match="failed on a part of a batch .* anew with method='accumulate'|goes on with method='acc"):
        learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    whole = make()
    with pytest.warns(UserWarning): whole.bs_find(1e-3, num_it=40, method='accumulate', show_plot=False, suggest_funcs=None)
    assert same(before, weights(learn))
    if nm=='kept': # which shows in the second part of a batch only
        assert np.allclose(learn.recorder.noise[-1], whole.recorder.noise[-1], rtol=.3)
        with pytest.warns(UserWarning, match="are not those that it makes for the whole.*'split' measures another noise"):
            return make().bs_find(1e-3, num_it=40, method='split', show_plot=False, suggest_funcs=None)
    assert same(learn.recorder.noise, whole.recorder.noise)
    with pytest.raises(RuntimeError, match="needs whole ones, use method='accumulate'"):
        make().bs_find(1e-3, num_it=40, method='split', show_plot=False)

def of_known(pred, y):
    "The mean over those targets that are known"
    known = ~y.isnan()
    return ((pred-y.nan_to_num())[known]**2).mean()

def masked(known):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(256,8)), dtype=torch.float32)
    y = x @ torch.tensor(rng.normal(size=(8,4)), dtype=torch.float32) + 1
    y[torch.tensor(rng.random((256,4)) > known)] = math.nan
    ds = list(zip(x, y))
    dls = DataLoaders.from_dsets(ds, ds[:32], bs=32, shuffle=True, drop_last=True, num_workers=0, device='cpu')
    return Learner(dls, nn.Linear(8,4), of_known, opt_func=SGD).remove_cb(ProgressCallback)

@pytest.mark.parametrize('known', [.1,.3])
def test_losses_over_what_is_known(known):
    "A part of a batch has another number of known targets, or none: what whole batches give, and no advice about the rate"
    set_seed(0)
    learn = masked(known)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.bs_find(1e-12, num_it=400, n_batch=5, beta=1, show_plot=False, suggest_funcs=None)
    assert any("method='accumulate'" in str(o.message) and 'mean of the losses of its parts' in str(o.message) for o in said)
    assert not any('learning rate' in str(o.message) for o in said)
    want = by_batches(learn, 60)
    assert abs(learn.recorder.noise_scale[-1]/(want[0]/want[1])-1) < .25
    with pytest.warns(UserWarning, match="mean of the losses of its parts|some items have no target"):
        learn.bs_find(1e-12, method='split', num_it=40, show_plot=False, suggest_funcs=None)
