"The same on a GPU, where there is one."
import gc, random
from copy import deepcopy

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import Tensor, nn
from fastai_bs_finder.all import *
from helpers import make_learner, plain_learner, same
from measuring import standing, trained

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]

@pytest.mark.parametrize('half', [False,True])
def test_leaves_no_trace_on_the_gpu(tmp_path, half):
    "Weights, optimizer and CUDA's random state are as before, and the search did its work there"
    learn = make_learner(tmp_path)
    learn.dls.to('cuda')
    if half: learn.to_fp16()
    with learn.no_logging(): learn.fit(1)
    weights,state = [p.clone() for p in learn.model.parameters()], deepcopy(learn.opt.state_dict())
    rng = torch.cuda.get_rng_state()
    learn.bs_find(1e-3, num_it=80, show_plot=False, suggest_funcs=None)
    assert torch.equal(rng, torch.cuda.get_rng_state())
    assert all(p.is_cuda and torch.equal(p, w) for p,w in zip(learn.model.parameters(), weights))
    for o,s in zip(learn.opt.state_dict()['state'], state['state']):
        assert all(torch.equal(o[k], s[k]) for k in s if isinstance(s[k], Tensor))
    assert learn.recorder.noise_scale and all(o > 0 for o in learn.recorder.noise_scale)

@pytest.mark.parametrize('method', ['accumulate','split'])
def test_half_precision_measures_the_same(tmp_path, method):
    "With a real scaler, over the same batches at weights that stand still"
    def measured(half):
        set_seed(0)
        learn = make_learner(tmp_path)
        learn.dls.to('cuda')
        if half: learn.to_fp16()
        learn.bs_find(1e-12, num_it=200, beta=1, method=method, show_plot=False, suggest_funcs=None)
        return np.array([learn.recorder.noise[-1], learn.recorder.scale[-1]])
    assert np.allclose(measured(True)/measured(False), 1, atol=.05)

@pytest.mark.parametrize('method', ['accumulate','split'])
def test_no_wait_between_measurements(tmp_path, method):
    "Once the first batches have been looked at, nothing asks the device for a number before a window is complete"
    learn = make_learner(tmp_path)
    learn.dls.to('cuda')
    class Watch(Callback):
        order = 1000
        def strict(self, last): torch.cuda.set_sync_debug_mode('default' if last or self.train_iter < 20 else 'error')
        def before_batch(self): self.strict(False)
        def before_step(self): self.strict((self.train_iter+1)%20==0)
        def after_batch(self): torch.cuda.set_sync_debug_mode('default')
    learn.add_cb(Watch())
    try: learn.bs_find(1e-3, num_it=60, n_batch=20, method=method, show_plot=False, suggest_funcs=None)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(learn.recorder.noise_scale)==3

def test_profile_on_the_gpu(tmp_path):
    "It runs there, memory is the device's, what doesn't fit is caught, and nothing of it stays allocated"
    learn = make_learner(tmp_path)
    learn.dls.to('cuda') # the model is still on the CPU
    def allocated():
        "Without what cuBLAS keeps for itself, and what earlier tests have left"
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces(), torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    before = allocated()
    class Greedy(Callback):
        def before_batch(self):
            if len(self.yb[0]) >= 128: self.learn.held = torch.empty(2**50, device='cuda')
    learn.add_cb(Greedy())
    stats = learn.bs_profile(show_plot=False)
    assert list(stats.index)==[8,16,32,64,128] and stats.fits.tolist()==[True]*4+[False]
    assert (stats.memory[:4] > 0).all() and stats.memory[64] > stats.memory[8]
    assert learn.recorder.profile.end=='128 did not fit: out of memory'
    assert not any(p.is_cuda for p in learn.model.parameters()) and allocated()==before

@pytest.mark.parametrize('half', [False,True])
def test_recipe_on_the_gpu(tmp_path, half):
    "Rates and batch sizes race there, a size that doesn't fit has lost, and the learner is as it was"
    learn = make_learner(tmp_path)
    learn.dls.to('cuda')
    learn.model.to('cuda')
    if half: learn.to_fp16()
    weights,rng = [p.clone() for p in learn.model.parameters()],torch.cuda.get_rng_state()
    class Greedy(Callback):
        def before_batch(self):
            if len(self.yb[0]) >= 128: self.learn.held = torch.empty(2**50, device='cuda')
    learn.add_cb(Greedy())
    sugg = learn.bs_find(seconds=30, show_plot=False)
    race = learn.recorder.race
    assert 0 < race.low <= race.high and sugg.lr > 0 and 8 <= sugg.fastest <= 64 and sugg.fastest==race.bs
    assert torch.equal(rng, torch.cuda.get_rng_state())
    assert all(torch.equal(p, w) for p,w in zip(learn.model.parameters(), weights))
    learn.remove_cb(Greedy)
    assert learn.lr_race(bs=16, seconds=10, show_plot=False).lr > 0

# --- what is watched, and what grows

precisions = dict(full=lambda o: o, half=Learner.to_fp16, brain=Learner.to_bf16)
def on_gpu(make, precision='full'):
    learn = make()
    learn.dls.to('cuda')
    return precisions[precision](learn)

@pytest.mark.parametrize('precision', precisions)
@pytest.mark.parametrize('cbs', [[], [lambda: GradientAccumulation(150)]])
def test_a_watched_training_is_the_same(precision, cbs):
    "Bit for bit, CUDA's random state too"
    def run(monitor):
        learn,res = trained(lambda: on_gpu(make_learner, precision), cbs, monitor=monitor)
        return learn,res | dict(cuda=torch.cuda.get_rng_state())
    _,without = run(None)
    learn,got = run(NoiseScaleMonitor(every=1))
    assert same(without, got)
    stats = learn.recorder.bs_find_stats
    assert len(stats) >= 5 and (stats.noise > 0).all()

@pytest.mark.parametrize('precision', ['half','brain'])
@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(128)]])
def test_watched_in_half_precision(precision, cbs):
    "Noise and scale are those in full precision"
    full,other = (standing(lambda: on_gpu(plain_learner, o), cbs, n=10)[1] for o in ('full',precision))
    assert np.allclose(np.divide(other, full), 1, atol=.05)

def test_memory_of_watching():
    "At most one copy of the gradients"
    def wide(): return plain_learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 50_000), nn.Linear(50_000, 10)))
    def peak(cbs):
        gc.collect()
        torch.cuda.empty_cache()
        learn = on_gpu(wide)
        torch.cuda.reset_peak_memory_stats()
        with learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
        return torch.cuda.max_memory_allocated(),4*sum(p.numel() for p in learn.model.parameters())
    (without,copy),(got,_) = peak([]),peak([NoiseScaleMonitor(every=1)])
    assert got-without < 1.02*copy

@pytest.mark.parametrize('precision', precisions)
def test_a_growing_batch_on_the_gpu(precision):
    "Accumulated it trains as with the whole batch at once, whatever the scaler does, and clipping comes after"
    def run(max_bs):
        set_seed(0)
        learn = on_gpu(lambda: plain_learner(n=1280, opt_func=SGD), precision)
        learn.dls.train.rng = random.Random(0)
        schedule = BatchSizeSchedule({0:64, 1:256}, max_bs=max_bs)
        with learn.no_logging(): learn.fit(3, .1, cbs=[schedule, GradientClip(.5)])
        return [n for _,n in schedule.history],[p.detach() for p in learn.model.parameters()]
    (parts,a),(whole,b) = run(64),run(None)
    assert parts==whole==[64]*20+[256]*10
    tol = dict(full=1e-4, half=3e-3, brain=3e-2)[precision]
    assert all(torch.allclose(o, p, atol=tol) for o,p in zip(a, b))
