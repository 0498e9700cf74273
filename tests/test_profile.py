"The profile: what it reports was tried, it ends where memory or time do, and the learner is as it was."
import gc, math, re, threading, time, weakref
from functools import partial
from unittest.mock import patch as mock_patch

import pytest, torch
from fastai.basics import Pipeline, Transform
from fastai.callback.core import (
    Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException)
from fastai.callback.data import PartialDL
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader, SkipItemException
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper, SGD
from torch import nn, Tensor
from fastai_bs_finder import profile
from fastai_bs_finder.profile import unstalled
from fastai_bs_finder.all import BSSuggestion
from helpers import digits, make_learner

def quick(learn, **kwargs): return learn.bs_profile(**dict(show_plot=False, limit=10.) | kwargs)

class Full(Callback):
    "Memory is used up from `bs` items on, in `event`"
    def __init__(self, bs, event, error): setattr(self, event, self.maybe); self.bs,self.error = bs,error
    def maybe(self):
        if len(self.yb[0]) >= self.bs: raise self.error

errors = dict(
    cuda=torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    cpu=RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    mps=RuntimeError('MPS backend out of memory'),
    cublas=RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    python=MemoryError('Unable to allocate'))

events = 'before_batch','after_pred','after_loss','before_backward','after_backward','before_step'

@pytest.mark.parametrize('bs,event', [*((16,o) for o in events), (256,'before_step'), (1024,'after_loss')])
def test_out_of_memory(learn, bs, event):
    "Wherever in a step: the size does not fit, the smaller ones do, nothing is said of larger ones"
    learn.add_cb(Full(bs, event, errors['cuda']))
    stats = quick(learn)
    assert list(stats.index)==[2**i for i in range(3, int(math.log2(bs))+1)]
    assert stats.fits.tolist()==[True]*(len(stats)-1)+[False]
    assert stats.loc[bs, ['step_time','items_per_second','memory']].isna().all()
    assert learn.recorder.profile.largest_fit==bs//2 and learn.recorder.profile.end==f'{bs:,} did not fit: out of memory'

@pytest.mark.parametrize('nm', errors)
def test_kinds_of_out_of_memory(learn, nm):
    learn.add_cb(Full(64, 'after_loss', errors[nm]))
    assert quick(learn).fits.tolist()==[True,True,True,False]

def test_nothing_fits(learn):
    "Down to a single item; then there is nothing to draw, and no suggestion either"
    learn.add_cb(Full(1, 'after_loss', errors['cuda']))
    stats = quick(learn)
    assert stats.fits.to_dict()=={1: False} and learn.recorder.profile.largest_fit is None
    with pytest.raises(ValueError, match='1 did not fit: out of memory'): learn.recorder.plot_bs_profile()

@pytest.mark.parametrize('most', [1,2,5])
def test_less_than_eight_fit(learn, most):
    "Large models have small batches"
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64,10)) # batch norm can't train on a single item
    learn.add_cb(Full(most+1, 'after_loss', errors['cuda']))
    learn.dls = learn.dls.with_bs(most)
    stats = quick(learn)
    assert stats.fits.to_dict()=={most: True, 8: False}
    learn.dls = learn.dls.with_bs(64)
    stats,fits = quick(learn),max(o for o in (1,2,4) if o <= most)
    assert stats.fits.to_dict()=={fits: True, 2*fits: False}
    assert learn.recorder.profile.end==f'{2*fits} did not fit: out of memory'

def test_out_of_memory_before_the_first_step(learn):
    "Saving the learner's state takes memory, too"
    def full(learn): raise errors['cuda']
    with mock_patch.object(profile, 'preserve', full): stats = quick(learn)
    assert stats.fits.tolist()==[False] and learn.recorder.profile.end=='8 did not fit: out of memory'

def test_the_table_is_yours(learn):
    "What is done to it changes nothing in the recorder"
    quick(learn, max_bs=16).drop(8, inplace=True)
    stats = learn.recorder.bs_profile_stats
    stats['step_time'] *= 0
    assert list(learn.recorder.bs_profile_stats.index)==[8,16] and learn.recorder.profile.time_of_step(8) > 0

def test_what_failed_is_let_go(learn):
    "The failed attempt's predictions are gone: neither learner nor error hold them"
    refs = []
    class Watch(Callback):
        def after_pred(self):
            if len(self.yb[0]) >= 64: refs.append(weakref.ref(self.pred))
    learn.add_cbs([Watch(), Full(64, 'after_loss', errors['cuda'])])
    quick(learn)
    gc.collect()
    assert refs and all(o() is None for o in refs)

@pytest.mark.parametrize('error', [
    ValueError('mine'), RuntimeError('another'), KeyboardInterrupt()], ids=lambda o: type(o).__name__)
def test_other_errors_are_the_users(learn, error):
    learn.add_cb(Full(1, 'after_loss', error))
    weights = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(type(error)): quick(learn)
    assert all(torch.equal(a, b) for a,b in zip(weights, learn.model.parameters()))
    assert not [o for o in threading.enumerate() if '_watch' in o.name]

@pytest.mark.parametrize('oom', [False,True])
@pytest.mark.parametrize('opt_func', [Adam, SGD, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam','SGD','torch'])
def test_no_trace(tmp_path, oom, opt_func):
    "A learner that was profiled in the middle of its life trains on like a twin that never was"
    def losses(look):
        learn = make_learner(tmp_path, opt_func=opt_func)
        with learn.no_logging(): learn.fit(1, 1e-2)
        if look:
            if oom: learn.add_cb(Full(128, 'after_backward', errors['cuda']))
            grads = [p.grad for p in learn.model.parameters()]
            before = learn.dls.train,learn.opt,list(learn.cbs),[None if g is None else g.clone() for g in grads]
            quick(learn, bss=[8,64,128])
            assert learn.dls.train is before[0] and learn.opt is before[1] and list(learn.cbs)==before[2]
            for p,g,c in zip(learn.model.parameters(), grads, before[3]):
                assert p.grad is g and (g is None or torch.equal(g, c))
            if oom: learn.remove_cb(Full)
        with learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
        return learn.recorder.losses, [p.clone() for p in learn.model.parameters()], torch.rand(1)
    (a,p,r),(b,q,s) = losses(False),losses(True)
    assert a==b and all(torch.equal(x, y) for x,y in zip(p, q)) and r==s

def test_keeps_what_was_recorded(learn):
    "Losses of the last training and a search before it"
    with learn.no_logging(): learn.fit(1)
    losses = list(learn.recorder.losses)
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    noise = list(learn.recorder.noise)
    quick(learn, max_bs=16)
    assert learn.recorder.losses==losses and learn.recorder.noise==noise
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    assert list(learn.recorder.bs_profile_stats.index)==[8,16]

def test_steps_are_whole(learn):
    "With the optimizer's state there, and the weights where they were"
    seen = []
    class Look(Callback):
        order = 500
        def before_batch(self): seen.append((len(self.yb[0]), len(self.opt.state) , next(self.model.parameters()).sum().item()))
    learn.add_cb(Look())
    stats = quick(learn, max_bs=64)
    assert {o[0] for o in seen}==set(stats.index) and all(o[1] for o in seen[1:]) and len({o[2] for o in seen})==1
    assert all(sum(o[0]==bs for o in seen) >= 5 for bs in stats.index)

class Slow(Callback):
    "Time that no machine's noise hides: per step and per item, and in the loader"
    def __init__(self, step=0., item=0.): self.step,self.item = step,item
    def after_pred(self): time.sleep(self.step+self.item*len(self.yb[0]))

def test_times_are_those_of_the_steps(learn):
    learn.add_cb(Slow(.02, .0005))
    stats = quick(learn, bss=[8,64,128], limit=20.)
    for bs in stats.index: assert .02+.0005*bs < stats.step_time[bs] < 1.5*(.02+.0005*bs)+.03
    assert (stats.data_share < .5).all() and (stats.items_per_second==stats.index/stats.step_time).all()

def test_waiting_for_data(learn):
    "A loader that takes most of the step's time"
    class Lazy(Transform):
        def encodes(self, x:Tensor): time.sleep(.001); return x
    learn.dls.train.after_item = Pipeline([Lazy()])
    stats = quick(learn, bss=[32])
    assert stats.data_share[32] > .5 and stats.step_time[32] > .032

def test_time_limit(learn):
    "It looks ahead: sizes that would take too long are not begun, and it says so"
    learn.add_cb(Slow(0., .004))
    start = time.perf_counter()
    stats = quick(learn, limit=3.)
    assert time.perf_counter()-start < 4.5
    assert 2 <= len(stats) < 8 and stats.fits.all()
    assert learn.recorder.profile.end==f'{stats.index[-1]} was the last that the time limit of 3 s allowed'

def test_machine_memory_is_left_alone(learn):
    "Where a size could take more than what is free, it is not even tried"
    class Memory(profile._Memory):
        def __init__(self, device, procs): super().__init__(device, procs); self.room = 1000*2**20
        def stop(self): super().stop(); self.peak = 100*2**20*learn.dls.train.bs/8
    with mock_patch.object(profile, '_Memory', Memory): stats = quick(learn)
    assert stats.memory.tolist()==[100,200,400,800] and stats.fits.all()
    assert learn.recorder.profile.end=='128 could take more than the 1,000 MB of memory that are free, so it was not tried'

def test_margin(learn):
    "What ran but left too little does not fit"
    class Memory(profile._Memory):
        def stop(self): super().stop(); self.peak = .95*self.room
    with mock_patch.object(profile, '_Memory', Memory): stats = quick(learn, margin=.1)
    assert stats.fits.to_dict()=={1: False} and stats.step_time.notna().all()
    assert learn.recorder.profile.end=='1 ran, but left less than 10% of the memory free'
    with mock_patch.object(profile, '_Memory', Memory): assert quick(learn, margin=.01, max_bs=8).fits.tolist()==[True]

@pytest.mark.slow
def test_memory_of_the_machine():
    "A step that keeps 200 MB for its backward pass shows"
    class Hungry(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(10))
        def forward(self, x):
            big = torch.ones(len(x), 25*2**20//4//8)*self.w[0]
            return x.flatten(1)[:,:10]*self.w + (big.sin()*0).sum()
    learn = make_learner()
    learn.model = Hungry()
    memory = quick(learn, bss=[64]).memory[64]
    assert 200 <= memory < 1500

def test_sizes(learn):
    "Powers of two from 8 as far as the data go, and the loader's own; or those that are asked for"
    assert list(quick(learn).index)==[2**i for i in range(3,11)]
    assert learn.recorder.profile.end=='1,024 is the largest power of two in a training set of 1,437'
    learn.dls = learn.dls.with_bs(50)
    assert list(quick(learn, max_bs=100).index)==[8,16,32,50,64]
    assert learn.recorder.profile.end=='64 is the largest power of two up to max_bs=100'
    assert list(quick(learn, bss=[100,20]).index)==[20,100]
    assert list(quick(learn, max_bs=4).index)==[4]

@pytest.mark.parametrize('kwargs,match', [
    (dict(bss=[]), 'bss must be whole numbers'), (dict(bss=[0]), 'bss must be whole numbers'),
    (dict(bss=[2000]), 'between 1 and the 1,437'), (dict(bss=[2.5]), 'bss must be whole'),
    (dict(max_bs=2.5), 'max_bs must be a whole'), (dict(limit=-1), 'limit must be a positive'),
    (dict(limit=math.inf), 'limit must be a positive'), (dict(margin=1), 'margin must be')])
def test_refused(learn, kwargs, match):
    with pytest.raises(ValueError, match=match): learn.bs_profile(**kwargs)

def test_loader_of_pytorch(learn):
    "It can't be given another batch size, so bs_find leaves out what needs that, and says so"
    learn.dls.loaders[0] = torch.utils.data.DataLoader(digits()[:640], batch_size=64, shuffle=True)
    with pytest.raises(ValueError, match='build your loaders with that batch size'): quick(learn)
    with pytest.warns(UserWarning, match='no batch size could be timed, so some suggestions are missing'):
        sugg = learn.bs_find(1e-2, num_it=40, show_plot=False)
    assert sugg.fastest is None and sugg.critical

def test_profile_is_made_once_and_again_when_it_no_longer_holds(learn):
    n = []
    with mock_patch.object(Learner, 'bs_profile', lambda self, **kw: (n.append(1), orig(self, **kw, max_bs=64))) as _:
        for _ in range(2): learn.bs_find(1e-2, num_it=40, show_plot=False)
        assert len(n)==1
        learn.bs_find(1e-2, num_it=40, show_plot=False, suggest_funcs=(BSSuggestion.Critical,))
        assert len(n)==1
        learn.model[0].requires_grad_(False)
        learn.bs_find(1e-2, num_it=40, show_plot=False)
        assert len(n)==2

orig = Learner.bs_profile

def test_an_old_profile_is_forgotten(learn):
    "Suggestions are not cut to what fitted another model"
    quick(learn, max_bs=16)
    learn.bs_find(1e-2, num_it=40, show_plot=False, suggest_funcs=BSSuggestion.Critical)
    assert learn.recorder.profile.largest_fit==16
    learn.model[0].requires_grad_(False)
    learn.bs_find(1e-2, num_it=40, show_plot=False, suggest_funcs=BSSuggestion.Critical)
    assert learn.recorder.profile.largest_fit is None

@pytest.mark.parametrize('works', [lambda bs: bs==64, lambda bs: bs!=8, lambda bs: bs<=64], ids=['64','not 8','up to 64'])
def test_sizes_that_fail(learn, works):
    "Any error at a batch size that the user never asked for: the loader's own is timed, and the search has its answers"
    class Fixed(Callback):
        def before_batch(self):
            if not works(len(self.yb[0])): raise RuntimeError('shape [64, 64] is invalid')
    learn.add_cb(Fixed())
    stats = quick(learn)
    assert [bs for bs,ok in stats.fits.items() if ok]==[2**i for i in range(3,11) if works(2**i)]
    if not works(1024): assert re.search('^128 failed: RuntimeError: .*shape .64, 64. is invalid$', learn.recorder.profile.end)
    sugg = learn.bs_find(1e-2, num_it=40, show_plot=False)
    assert works(sugg.fastest) and sugg.critical

def test_the_error_of_a_plain_training(learn):
    "If the loader's own size fails, and no other one has worked, it is the user's, and a search is not lost by it"
    class Broken(Callback):
        def before_batch(self):
            if hasattr(self.dl, 'on_wait'): raise RuntimeError('mine') # only in a profile
    learn.add_cb(Broken())
    with pytest.raises(RuntimeError, match='mine'): quick(learn)
    with pytest.warns(UserWarning, match='(?s)no batch size could be timed.*mine'):
        sugg = learn.bs_find(1e-2, num_it=40, show_plot=False)
    assert sugg.fastest is None and sugg.critical

def test_out_of_memory_the_second_time(learn):
    "What fitted once and then doesn't, does not fit"
    class Second(Callback):
        n = 0
        def before_train(self):
            if self.dl.bs==256: self.n += 1
            if self.n==2: raise errors['cuda']
    learn.add_cb(Second())
    stats = quick(learn)
    assert stats.fits.tolist()==[True]*5+[False] and stats.index[-1]==256
    assert learn.recorder.profile.end=='256 did not fit: out of memory'

@pytest.mark.parametrize('bs,event,exc', [
    (64,'before_batch',CancelFitException), (64,'before_batch',CancelBatchException),
    (64,'before_step',CancelStepException), (8,'before_batch',CancelBatchException)])
def test_sizes_that_never_make_a_step(learn, bs, event, exc):
    "Only whole steps count"
    learn.add_cb(type(
        'Ends', (Callback,), {event: lambda self: (_ for _ in ()).throw(exc()) if self.dls.train.bs >= bs else None})())
    stats = quick(learn)
    assert list(stats.index)==[o for o in (8,16,32) if o < bs] and stats.fits.all()
    assert f'{bs} could not be timed' in learn.recorder.profile.end

@pytest.mark.slow
def test_epochs_without_a_batch(learn):
    "More than the loader gives in an epoch are not tried, and it doesn't wait for them"
    learn.dls.loaders[0] = PartialDL(digits()[:200], bs=16, partial_n=70, drop_last=True, shuffle=True)
    assert list(quick(learn).index)==[8,16,32,64]
    with pytest.raises(ValueError, match='between 1 and the 70 items'): quick(learn, bss=[100])
    class Skips(Transform):
        def encodes(self, o): raise SkipItemException
    learn.dls.loaders[0] = DataLoader(digits()[:200], bs=16, after_item=Skips())
    assert quick(learn, limit=1.).empty and '8 could not be timed: there were no batches' in learn.recorder.profile.end

def test_busy_machine(learn):
    "Times that no machine has by itself are called in question"
    class Busy(Callback):
        def before_batch(self):
            if len(self.yb[0])==32: time.sleep(.05)
    learn.add_cb(Busy())
    with pytest.warns(UserWarning, match='step times scatter, by up to'): quick(learn)

def test_device_is_the_one_it_will_train_on(learn):
    "The model gets there when a fit begins, not before"
    learn.dls.device = 'meta'
    assert profile.device_of(learn)==torch.device('meta')
    learn.dls.device = None
    assert profile.device_of(learn)==torch.device('cpu')

def test_batches_that_workers_have_ready_do_not_count():
    "Their queue is used up before the clock starts"
    watch = profile._Stopwatch(torch.device('cpu'), math.inf, workers=4)
    assert watch.left >= 2+2*4

def test_exported_learner_has_no_profile(learn, tmp_path):
    "It opens where the package is not installed"
    quick(learn, max_bs=16)
    import pickle
    assert type(pickle.loads(pickle.dumps(learn.recorder))).__name__=='Recorder'
    assert b'profile' not in pickle.dumps(learn.recorder)

@pytest.mark.parametrize('message', [
    'CUDA error: invalid configuration argument', 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":838',
    'nonzero is not supported for tensors with more than INT_MAX elements',
    'Unable to find a valid cuDNN algorithm to run convolution', 'std::bad_alloc'])
def test_errors_that_do_not_say_out_of_memory(learn, message):
    "The rows so far are kept, and the reason is told"
    learn.add_cb(Full(256, 'after_pred', RuntimeError(message)))
    stats = quick(learn)
    assert stats.fits.to_dict()=={8: True, 16: True, 32: True, 64: True, 128: True, 256: False}
    end = learn.recorder.profile.end
    assert end.startswith('256 ') and (message[:20] in end or 'out of memory' in end)
    assert learn.bs_find(1e-2, num_it=40, show_plot=False).fastest <= 128

def test_last_batch_of_one(tmp_path):
    "Batch norm can't train on it: 257 items leave one over at 8, 16 ... 256, and the sizes are timed from their whole batches"
    learn = make_learner(tmp_path)
    learn.dls = DataLoaders.from_dsets(digits()[:257], digits()[:64], bs=60, num_workers=0, shuffle=True, device='cpu')
    stats = quick(learn)
    assert stats.fits.all() and list(stats.index)==[8,16,32,60,64,128,256]
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.bs_find(1e-2, num_it=40, show_plot=False).critical
    learn.bs_find(1e-2, bs=64, num_it=40, show_plot=False, suggest_funcs=None)
    assert learn.recorder.search.n_iter[-1]==40

def test_the_loaders_own_size_is_among_the_rows(learn):
    "Where it works, whatever else does"
    learn.dls = learn.dls.with_bs(50)
    learn.add_cb(Full(51, 'after_loss', RuntimeError('too many')))
    assert quick(learn).fits.to_dict()=={8: True, 16: True, 32: True, 50: True, 64: False}

@pytest.mark.parametrize('change,match', [
    (lambda o: setattr(o, 'loss_func', None), 'the learner has no loss function'),
    (lambda o: o.model.requires_grad_(False), 'no trainable parameter'),
    (lambda o: setattr(o, 'model', nn.Flatten()), 'no trainable parameter'),
    (lambda o: setattr(o.dls.train, 'n', 0), 'the training set is empty')], ids=['loss','frozen','no parameter','empty'])
def test_messages_are_those_of_a_search(learn, change, match):
    change(learn)
    for f in (lambda: quick(learn), lambda: learn.bs_find(1e-2, show_plot=False)):
        with pytest.raises(ValueError, match=match): f()

@pytest.mark.parametrize('own,most,rows', [
    (512, 100, {8: True, 16: True, 32: True, 64: True, 128: False}), (64, 2, {2: True, 4: False})])
def test_the_loaders_own_size_is_too_large(learn, own, most, rows):
    "In words that nobody knows: what works is found below"
    learn.dls = learn.dls.with_bs(own)
    learn.add_cb(Full(most+1, 'after_pred', RuntimeError('invalid configuration argument')))
    assert quick(learn).fits.to_dict()==rows
    assert learn.recorder.profile.end.startswith(f'{max(rows)} failed: RuntimeError')

def test_a_mistake_is_no_lack_of_memory(learn):
    "It fails at every size, and is raised"
    learn.add_cb(Full(1, 'after_pred', RuntimeError('my mistake')))
    with pytest.raises(RuntimeError, match='my mistake'): quick(learn)

def test_only_a_training_loader(learn):
    learn.dls = DataLoaders(learn.dls.train)
    assert list(quick(learn, max_bs=32).index)==[8,16,32] and learn.bs_find(1e-2, num_it=40, show_plot=False) is not None

not_caught = [('before_fit',CancelTrainException), ('before_fit',CancelEpochException), ('before_epoch',CancelTrainException)]

@pytest.mark.parametrize('event', ['before_train','before_fit','before_epoch'])
@pytest.mark.parametrize('exc', [CancelFitException, CancelTrainException, CancelEpochException])
def test_callbacks_that_cancel_at_once(learn, event, exc):
    "It ends, with a reason"
    class Cancel(Callback):
        def before_batch(self): self.learn.xb = self.xb
    setattr(Cancel, event, lambda self: (_ for _ in ()).throw(exc()))
    learn.add_cb(Cancel())
    start = time.perf_counter()
    if (event,exc) in not_caught: # by fastai either
        with pytest.raises(exc): quick(learn, limit=2.)
        return
    stats = quick(learn, limit=2.)
    assert time.perf_counter()-start < 10 and not stats.fits.any() and 'could not be timed' in learn.recorder.profile.end

def test_limit_holds_for_the_first_size(learn):
    "And for a loader that takes its time"
    class Slow(Callback):
        def before_batch(self): time.sleep(.2); self.learn.xb = self.xb
    learn.add_cb(Slow())
    start = time.perf_counter()
    stats = quick(learn, limit=1.)
    assert time.perf_counter()-start < 3 and len(stats)==1 and stats.fits.all()

def test_callbacks_may_allocate_by_the_number_of_epochs(learn):
    class PerEpoch(Callback):
        def before_fit(self): self.all = torch.zeros(self.n_epoch, 10)
        def before_batch(self): self.learn.xb = self.xb
    learn.add_cb(PerEpoch())
    assert quick(learn, max_bs=16).fits.all()

def test_callbacks_clean_up_after_each_size(learn):
    "A size that ends by cancelling lets them"
    events = []
    class Clean(Callback):
        def before_fit(self): events.append('+')
        def before_batch(self): self.learn.xb = self.xb
        def after_fit(self): events.append('-')
    learn.add_cb(Clean())
    quick(learn, max_bs=16)
    assert events and ''.join(events)=='+-'*(len(events)//2)

def test_rows_stay_after_an_interrupt(learn):
    learn.add_cb(Full(128, 'after_loss', KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): quick(learn)
    assert list(learn.recorder.bs_profile_stats.index)==[8,16,32,64]

# --- beside other programs

def threads(monkeypatch, n, times):
    "As if there were `n` threads, with which an operation takes so many `times` as long as with one; the numbers as they are set"
    now = [n]
    monkeypatch.setattr(torch, 'get_num_threads', lambda: now[-1])
    monkeypatch.setattr(torch, 'set_num_threads', now.append)
    monkeypatch.setattr(profile, '_seconds_each', lambda k: 1e-3*(times if k > 1 else 1))
    return now

@pytest.mark.parametrize('device,n,times,inside', [('cpu',4,100,1), ('cpu',4,1.5,4), ('cpu',1,100,1), ('cuda',4,100,4)])
def test_threads_that_wait_for_each_other(monkeypatch, recwarn, device, n, times, inside):
    "One is enough then, and only then; afterwards, also after an error, there are as many as before"
    now = threads(monkeypatch, n, times)
    with pytest.raises(KeyError):
        with unstalled(torch.device(device)):
            assert now[-1]==inside
            raise KeyError
    assert now[-1]==n
    assert ['PyTorch\'s 4 threads wait for each other' in str(o.message) for o in recwarn]==[True]*(inside < n)

def test_one_thread_in_a_profile_and_in_searches(learn, monkeypatch):
    "It is said once; a profile that was made with one thread is not taken for that of four"
    now,seen = threads(monkeypatch, 4, 100),set()
    class Look(Callback):
        run_mock = True
        def before_batch(self): seen.add(now[-1])
    learn.add_cb(Look())
    calls = [lambda: quick(learn), lambda: learn.bs_find(seconds=2., show_plot=False), lambda: learn.lr_race(seconds=1., show_plot=False),
             lambda: learn.bs_find(1e-3, num_it=20, show_plot=False)]
    for f in calls:
        with pytest.warns(UserWarning, match='wait for each other') as said: f()
        assert sum('wait for each other' in str(o.message) for o in said)==1 and seen=={1} and now[-1]==4
    key = learn.recorder.profile.key
    assert key!=profile.profile_key(learn)

def test_load_that_begins_later(monkeypatch):
    "A single hiccup is none; where it is noticed within a search, one thread is enough to the end of it, and it is said once"
    now,times = threads(monkeypatch, 4, 1),iter([1]+[100]+[1]*5+[100]*6)
    monkeypatch.setattr(profile, '_seconds_each', lambda k: 1 if k==1 else next(times))
    with pytest.warns(UserWarning, match='wait for each other') as said:
        with unstalled(torch.device('cpu')):
            with unstalled(torch.device('cpu')): assert now[-1]==4
            with unstalled(torch.device('cpu')): assert now[-1]==1
            assert now[-1]==1
            with unstalled(torch.device('cpu')): assert now[-1]==1
    assert now[-1]==4 and len(said)==1 and not profile._inside

def test_real_threads(monkeypatch):
    "However busy the machine is"
    before,seen,each = torch.get_num_threads(),[],profile._seconds_each
    def watched(n):
        res = each(n)
        seen.append((torch.get_num_threads(),res))
        return res
    monkeypatch.setattr(profile, '_seconds_each', watched)
    torch.set_num_threads(2)
    try:
        with unstalled(torch.device('cpu')): inside = torch.get_num_threads()
        assert torch.get_num_threads()==2
    finally: torch.set_num_threads(before)
    ratios = [a/b for (_,a),(_,b) in zip(seen[::2], seen[1::2])]
    assert [o for o,_ in seen]==[2,1]*(6 if ratios[0] > profile._stalled else 1)
    assert inside==(1 if ratios[0] > profile._stalled and sorted(ratios[1:])[2] > profile._stalled else 2)
