"A search that goes wrong keeps what it has measured, puts everything back and says what to do."
import math, random, warnings

import matplotlib.pyplot as plt, pandas as pd, pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed, TensorCategory
from torch import nn
from fastai_bs_finder.all import BSFinder
from fastai_bs_finder.recorder import BSRecorder, Search
from fastai_bs_finder.stats import noise_scale
from fastai_bs_finder.suggest import critical
from helpers import digits, make_learner, plain_learner, same, search, weights

# --- NaN

def broken_loss(learn, k, change):
    "From the `k`th batch on the loss is what `change` makes of it"
    n,old = [0],learn.loss_func
    def loss(*args):
        n[0] += 1
        return change(old(*args)) if n[0]>=k else old(*args)
    loss.reduction,learn.loss_func = 'mean',loss # said, so that nobody needs to try
    return n

class BadGrad(torch.autograd.Function):
    "The identity, with a gradient of `bad`"
    @staticmethod
    def forward(ctx, x, bad): ctx.bad = bad; return x.clone()
    @staticmethod
    def backward(ctx, g): return g*ctx.bad,None

accidents = dict(
    loss_nan=('loss', lambda l: l*math.nan), loss_inf=('loss', lambda l: l+math.inf),
    loss_minus_inf=('loss', lambda l: l-math.inf), grad_nan=('gradient', lambda l: BadGrad.apply(l, math.nan)),
    grad_inf=('gradient', lambda l: BadGrad.apply(l, math.inf)))

@pytest.mark.parametrize('method', ['accumulate','sequential'])
@pytest.mark.parametrize('accident', accidents)
def test_nan_mid_way(learn, accident, method):
    "Stop at once, put the weights back, keep the measurements made before, warn, and suggest from what there is"
    what,change = accidents[accident]
    if method=='sequential': what = 'loss' # which the next step ruins
    n,before,modes = broken_loss(learn, 25, change),weights(learn),[m.training for m in learn.model.modules()]
    said = f'The {what} became NaN or infinite between batches 21 and 30. 2 measurements .*kept.*lower learning rate'
    with pytest.warns(UserWarning, match=said) as ws:
        res = search(learn, num_it=60, method=method)
    assert len(ws)==1 and n==[30] and learn.recorder.search.n_iter==[10,20]
    assert all(map(math.isfinite, learn.recorder.noise+learn.recorder.scale)) and res[:-1]==(critical(learn.recorder),)
    assert same(before, weights(learn)) and learn.opt is None and [m.training for m in learn.model.modules()]==modes

@pytest.mark.parametrize('method', ['accumulate','sequential'])
def test_one_bad_batch(learn, method):
    "One such batch is enough, though the weights are still good"
    n = broken_loss(learn, 15, lambda l: l*(math.nan if n[0]==15 else 1))
    with pytest.warns(UserWarning, match='loss became NaN'): search(learn, method=method)
    assert learn.recorder.search.n_iter==[10] and n==[20]

@pytest.mark.parametrize('lr', [1e20,1e30])
def test_huge_lr(learn, lr):
    "A learning rate that destroys the weights at the first step"
    before = weights(learn)
    with pytest.warns(UserWarning, match='became NaN or infinite.*lower learning rate'): search(learn, lr=lr)
    assert len(learn.recorder.noise) < 3 and all(map(math.isfinite, learn.recorder.noise)) and same(before, weights(learn))

@pytest.mark.parametrize('accident', accidents)
def test_nan_in_first_window(learn, accident):
    "Nothing was measured, so nothing is suggested or drawn; the measurements of an earlier search stay"
    what,change = accidents[accident]
    search(learn)
    earlier,before = learn.recorder.bs_find_stats,weights(learn)
    broken_loss(learn, 3, change)
    with pytest.warns(UserWarning, match=f'The {what} became NaN or infinite between batches 1 and 10. 0 measurements'):
        res = search(learn, show_plot=True)
    assert res is None and not plt.get_fignums() and earlier.equals(learn.recorder.bs_find_stats) and same(before, weights(learn))

def test_nan_in_first_window_of_first_search(learn):
    "And without an earlier search there is nothing to draw, which is said"
    broken_loss(learn, 1, lambda l: l*math.nan)
    with pytest.warns(UserWarning, match='no measurement'): assert search(learn) is None
    assert not len(learn.recorder.noise) and learn.recorder.bs_find_stats.empty
    with pytest.raises(ValueError, match='bs_find'): learn.recorder.plot_bs_find()

def test_works_after_nan(learn):
    "A search after one that went wrong finds the same as without it"
    expected,old = search(learn),learn.loss_func
    stats = learn.recorder.bs_find_stats
    broken_loss(learn, 15, lambda l: l*math.nan)
    with pytest.warns(UserWarning): search(learn)
    assert len(learn.recorder.noise)==1
    learn.loss_func = old
    assert search(learn)==expected and learn.recorder.bs_find_stats.equals(stats)

def test_callback_warns_and_goes_on(learn):
    "In an ordinary training the callback only watches: it warns once, and the training is the user's to stop"
    broken_loss(learn, 8, lambda l: l*math.nan)
    with learn.no_logging(), pytest.warns(UserWarning, match='NaN or infinite') as ws: learn.fit(1, 1e-2, cbs=BSFinder(n_batch=5))
    assert len([w for w in ws if 'NaN or infinite' in str(w.message)])==1 and len(learn.recorder.losses)==22
    assert learn.recorder.search.n_iter==[5]

def test_the_good_parts_of_a_bad_measurement_count(learn):
    "One micro-batch with an infinite gradient spoils its own batch, and not the four others of the measurement"
    class Once(Callback):
        n,order = 0,10
        def before_backward(self):
            self.n += 1
            if self.n==6: self.learn.loss_grad = self.learn.loss_grad*math.inf
        def before_step(self):
            if self.n==8: raise CancelStepException() # or the weights were infinite from here on
    finder = BSFinder(method='split', n_batch=5, beta=1)
    with learn.no_logging(), pytest.warns(UserWarning, match='The gradient became NaN or infinite between batches 1 and 5'):
        learn.fit(1, 1e-12, cbs=[finder, Once()])
    assert learn.recorder.search.n_iter[0]==5 and finder.running.rows[0][-1]==4*64

class Scaler(Callback):
    "Stands for a loss scaler that overflows at first: the gradients of the first batches are infinite, the losses are not"
    order = MixedPrecision.order
    def __init__(self, n, bad=()): self.n,self.bad,self.seen = n,bad,0
    def before_fit(self): self.learn.scaler = self
    def is_enabled(self): return True
    def scale(self, o): return o*1024.
    def get_scale(self): raise AssertionError('this would wait for the device')
    def after_pred(self):
        self.seen += 1
        if self.seen in self.bad: self.learn.pred = self.learn.pred*math.nan
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*(1024. if self.seen > self.n else math.inf)
    def before_step(self):
        if self.seen <= self.n: raise CancelStepException()
        for p in self.learn.model.parameters(): p.grad.div_(1024)

def test_loss_scale(learn, tmp_path):
    "A loss scale does not show in the numbers, and windows that overflow are left out"
    search(learn)
    plain = learn.recorder.bs_find_stats
    scaled = make_learner(tmp_path)
    scaled.add_cb(Scaler(0))
    search(scaled)
    pd.testing.assert_frame_equal(plain, scaled.recorder.bs_find_stats, rtol=1e-3)
    overflowing = make_learner(tmp_path)
    overflowing.add_cb(Scaler(10))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        search(overflowing, num_it=40)
    assert overflowing.recorder.search.n_iter == [20,30,40]

def test_nan_after_overflow(learn):
    "An overflow that the scaler answers does not silence the warning of a real NaN later"
    learn.add_cb(Scaler(10, bad=range(25,100)))
    with pytest.warns(UserWarning, match='loss became NaN or infinite between batches 21 and 30. 1 measurement'):
        search(learn, num_it=60)
    assert learn.recorder.search.n_iter == [20]

def test_bf16_infinite_gradient():
    "A scaler that is not in use answers no overflow"
    learn = plain_learner()
    class Off(Callback):
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', enabled=False)
        def after_loss(self):
            if self.train_iter==13: self.learn.loss_grad = self.learn.loss_grad*math.inf
    learn.add_cb(Off())
    with pytest.warns(UserWarning, match='The gradient became NaN or infinite between batches 11 and 20'): search(learn)

# --- a weak signal

def drowned(learn):
    "A loss whose gradient is as long in each batch, and cancels out over two"
    n,old = [0],learn.loss_func
    def loss(*args): n[0] += 1; return old(*args)*(-1)**n[0]
    learn.loss_func = loss
    return learn

@pytest.mark.parametrize('method', ['accumulate','sequential'])
def test_drowned_signal(learn, method):
    "Where noise hides the gradient the noise scale is inf, never negative, and the user hears what to do"
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
    before = weights(drowned(learn))
    with pytest.warns(UserWarning, match='drowned in noise.*inf.*Raise num_it, n_batch or bs'):
        res = search(learn, lr=1e-6, method=method, show_plot=True)
    assert res[:-1]==(None,) and learn.recorder.noise_scale==[math.inf]*3 and min(learn.recorder.noise) > 0
    assert max(learn.recorder.scale) <= 0
    assert plt.get_fignums() and same(before, weights(learn))

def test_never_negative(learn):
    "Random labels, small windows: estimates of either sign, a noise scale of none"
    learn.dls.loaders[0] = learn.dls.train.new([(o[0], TensorCategory(random.randrange(10))) for o in learn.dls.train.dataset])
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        res = search(learn, num_it=200, n_batch=2, beta=0.)
    ns = learn.recorder.noise_scale
    assert len(ns)==100 and min(ns) >= 0 and not any(map(math.isnan, ns))
    assert math.isinf(learn.recorder.settled().noise_scale)==any('drowned' in str(w.message) for w in ws)
    assert math.inf in ns
    assert res.critical is None or 1 <= res.critical <= 1437

@pytest.mark.parametrize('noise,scale,expected', [
    (1.,-1.,math.inf), (1.,0.,math.inf), (-1.,1.,0.), (-1.,-1.,math.inf), (0.,1.,0.), (3.,2.,1.5)])
def test_noise_scale_of_any_estimates(noise, scale, expected):
    "An unbiased estimate can be negative, the noise scale cannot"
    assert noise_scale(noise, scale)==expected

@pytest.mark.parametrize('series,expected', [
    ([math.inf]*8,None), ([8.]*6+[math.inf,100.],128), ([8.]*6+[math.inf]*2,None), ([0.]*4,1), ([1e9]*4,1024),
    ([3.],4)], ids=str)
def test_suggestion_is_sensible(learn, series, expected):
    "A power of two between 1 and the training set, or None"
    rec = BSRecorder.of(learn)
    rec.keep(search=Search(n_items=1437))
    for i,o in enumerate(series): rec.search.add(i, o if math.isfinite(o) else 1., 1. if math.isfinite(o) else -1.)
    assert critical(rec)==expected

def test_drowned_signal_says_at_least():
    "Random labels, and weights that fit them as well as can be"
    learn = plain_learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64,10)))
    set_seed(1)
    learn.dls.loaders[0].dataset = [(x,TensorCategory(random.randrange(10))) for x,_ in digits()[:1437]]
    with learn.no_logging(): learn.fit(30, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        search(learn, lr=1e-6, num_it=100, n_batch=2, bs=8)
    row = learn.recorder.settled()
    assert learn.recorder.search.upper[-1]==math.inf and row.lower > 0
    assert learn.recorder.bs_find_summary().startswith(f'critical batch size at least {row.lower:,.0f}')

def test_an_interval_without_an_upper_end_is_said():
    "Too few batches for the interval to know anything: the number comes with a warning"
    with pytest.warns(UserWarning, match='noise scale may be far off: critical batch size (unknown|at least).*Raise num_it'):
        search(plain_learner(), lr=1e-12, num_it=20, n_batch=10)

def test_no_noise_at_all():
    "Items that are all alike: an interval of no width, and still a sentence"
    rec = Search(n_items=100)
    rec.add(5, 0., 1., 0., 0.)
    assert rec.summary()=='critical batch size 0, 95% interval 0 to 0, so 1'

# --- other accidents

def test_a_search_that_diverges_says_so():
    with pytest.warns(UserWarning, match='The loss grew [0-9,.]+ times during the search.*Lower the learning rate'):
        search(plain_learner(opt_func=SGD), lr=30., num_it=60)

def test_windows_larger_than_the_data(learn):
    "Batches that share examples look too much alike, and that is said"
    with pytest.warns(UserWarning, match='is more than the 1,437 of the training set.*Lower n_batch or bs'): search(learn, bs=256)

def test_all_batches_alike():
    "Where every batch is the whole training set there is no noise to see, and that is said"
    x,y = torch.rand(40,3),torch.arange(40)%2
    dls = DataLoaders.from_dsets(list(zip(x,y)), list(zip(x,y)), bs=40, shuffle=True, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Linear(3,2), CrossEntropyLossFlat()).remove_cb(ProgressCallback)
    with pytest.warns(UserWarning, match='is more than the 40.*comes out too low'):
        assert search(learn, method='accumulate').critical==1

def test_all_batches_cancelled():
    "A search without a single loss says so"
    class Cancel(Callback):
        def before_batch(self): raise CancelBatchException()
    learn = plain_learner(cbs=Cancel())
    with pytest.warns(UserWarning, match='no measurement.*other callbacks cancelled every batch'): assert search(learn) is None

def test_unfinished_window_leaves_no_gradient(learn):
    "A fit that ends within a window does not hand its sums to the next"
    with learn.no_logging(): learn.fit(1, cbs=BSFinder(n_batch=20))
    assert all(not p.grad.any() for p in learn.model.parameters())

@pytest.mark.parametrize('method', ['accumulate','split'])
@pytest.mark.parametrize('added', [False,True], ids=['with cbs','on the learner'])
def test_interrupted_fit_leaves_nothing(method, added):
    "Neither part of a window in the gradients of the next fit nor hooks nor a loader that cuts"
    learn,finder = plain_learner(),BSFinder(method=method)
    class Stop(Callback):
        def after_backward(self):
            if self.train_iter==3: raise KeyboardInterrupt
    if added: learn.add_cb(finder)
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-12, cbs=[Stop()] + ([] if added else [finder]))
    learn.remove_cb(finder)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    assert type(learn.dl).__name__!='MicroBatches' and not any(p._backward_hooks for p in learn.model.parameters())

def test_no_warning_otherwise(learn):
    "A search without an accident is silent"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert search(learn, show_plot=True) is not None
