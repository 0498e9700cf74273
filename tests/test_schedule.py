"Batch sizes that follow a schedule: steps are made of as many items as are due, and all else stays as it is."
import math, pickle, random
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.data.core import DataLoaders
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.metrics import accuracy
from fastai_bs_finder.all import *
from fastai.learner import Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from torch.nn import functional as F
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.torch_core import set_seed
from helpers import make_learner, plain_learner, same, search, small_table

class Steps(Callback):
    "Progress, items, rate and gradient of each step"
    order = 9
    def before_fit(self): self.items,self.rows,self.n_iters = 0,[],[]
    def before_train(self): self.n_iters.append(len(self.dl))
    def after_backward(self): self.items += len(self.yb[0])
    def before_step(self):
        grad = torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone()
        self.rows.append((self.epoch, self.pct_train, self.items, self.opt.hypers[-1]['lr'], grad))
        self.items = 0

def fit(sched, learn=None, epochs=4, lr=1e-3, fit='fit', cbs=(), **kwargs):
    learn,steps = learn or plain_learner(),Steps()
    cb = BatchSizeSchedule(sched, **kwargs)
    with learn.no_logging(): getattr(learn, fit)(epochs, lr, cbs=[cb, steps, *cbs])
    return learn,cb,steps

def sizes(steps, epoch): return [o[2] for o in steps.rows if o[0]==epoch]

def test_by_epochs():
    "Loaders of other sizes, and the learner's own again at the end; before the first entry it is the learner's own"
    learn = plain_learner()
    dl = learn.dls.train
    _,cb,steps = fit({1:128, 3:512}, learn)
    assert [set(sizes(steps, o)) for o in range(4)]==[{64},{128},{128},{512}] and steps.n_iters==[22,11,11,2]
    assert learn.dls.train is dl and [o for _,o in cb.history]==[o[2] for o in steps.rows]

def test_within_an_epoch():
    "Several batches of the loader make a step; the last one has what is left"
    _,_,steps = fit(lambda p: 64 if p < .5 else 200, epochs=1)
    assert steps.n_iters==[22] and sizes(steps, 0)==[64]*11+[192]*3+[128]

def test_as_much_as_fits():
    _,_,steps = fit({0:256}, epochs=1, max_bs=64)
    assert steps.n_iters==[22] and sizes(steps, 0)==[256]*5+[128]
    learn = plain_learner()
    learn.bs_profile([32,64], show_plot=False)
    _,_,steps = fit({0:256}, learn, epochs=1)
    assert steps.n_iters==[22]

@pytest.mark.parametrize('sched', [{0:64}, lambda p: 64., SchedExp(64, 64)])
@pytest.mark.parametrize('how', ['fit','fit_one_cycle','fit_flat_cos'])
def test_no_change_is_no_change(sched, how):
    "Bit for bit the training without it"
    def run(cbs):
        learn = make_learner(metrics=accuracy)
        with learn.no_logging(): getattr(learn, how)(2, 1e-2, cbs=cbs)
        rec = learn.recorder
        return dict(w=dict(learn.model.state_dict()), opt=learn.opt.state_dict(), losses=rec.losses,
                    values=rec.values, rng=torch.get_rng_state())
    assert same(run(BatchSizeSchedule(sched)), run([]))

def test_gradients_are_means():
    "A step of 192 items has their mean gradient, whether at once, accumulated, or cut off by the end of the epoch"
    def first(sched, epochs=1, **kwargs):
        learn = plain_learner(n=192)
        learn.dls.train.rng = random.Random(0)
        return fit(sched, learn, epochs=epochs, **kwargs)[2].rows[0]
    whole,parts,cut = first({0:192}),first({0:192}, max_bs=64),first({0:192}, max_bs=80)
    assert whole[2]==parts[2]==192 and torch.allclose(whole[4], parts[4], atol=1e-6)
    assert cut[2]==160

def test_end_of_an_epoch():
    "Three batches of 64 for a step of 256: their mean all the same"
    def first(sched, **kwargs):
        learn = plain_learner(n=192)
        learn.dls.train.rng = random.Random(0)
        return fit(sched, learn, epochs=1, **kwargs)[2].rows[0]
    got,want = first(lambda p: 64 if p < 0 else 1000, max_bs=64),first({0:192})
    assert got[2]==192 and torch.allclose(got[4], want[4], atol=1e-6)

@pytest.mark.parametrize('n', [192,160])
def test_sums_are_sums(n):
    "Accumulated, a loss that adds up its items has the gradient of all of them"
    def first(**kwargs):
        learn = plain_learner(n=n, loss=CrossEntropyLossFlat(reduction='sum'))
        learn.dls.train.rng = random.Random(0)
        return fit({0:160}, learn, epochs=1, **kwargs)[2].rows[0]
    whole,parts = first(),first(max_bs=32)
    assert whole[2]==parts[2]==160 and torch.allclose(whole[4], parts[4], rtol=1e-4, atol=1e-4)

def test_what_an_epoch_leaves():
    "The gradients of a step that its end, or somebody, has cut off are not added to the next one"
    class Short(Callback):
        def after_batch(self):
            if self.training and self.iter==5: raise CancelTrainException()
    learn = plain_learner()
    learn.dls.train.shuffle = False
    _,_,cut = fit({0:256}, learn, epochs=2, lr=0., max_bs=64, cbs=[Short()])
    assert [o[2] for o in cut.rows]==[256,384] # the first two batches of these belong to no step
    assert torch.allclose(cut.rows[0][4], cut.rows[1][4], atol=1e-7)
    assert all((p.grad is None) or not p.grad.any() for p in learn.model.parameters())

def test_losses_are_logged_as_they_are():
    losses = [fit({0:o}, epochs=1, lr=1e-12, max_bs=64)[0].recorder.losses for o in (64,256)]
    assert np.allclose(*losses, rtol=1e-4)

@pytest.mark.parametrize('power', [0.,.5,1.])
@pytest.mark.parametrize('how', ['fit','fit_one_cycle'])
def test_learning_rate(how, power):
    "Moved with the batch on top of the schedule that the fit has, also where gradients are accumulated"
    sched = lambda p: 64 if p < .25 else 128 if p < .6 else 512
    _,_,moved = fit(sched, fit=how, lr_power=power, max_bs=256)
    _,_,plain = fit(sched, fit=how, max_bs=256)
    for a,b in zip(moved.rows, plain.rows, strict=True):
        full = {64:64, 128:128}.get(b[2], 512) # the last step of an epoch may have fewer items
        if b[1] < .25: full = 64
        assert a[:3]==b[:3] and a[3]==pytest.approx(b[3]*(full/64)**power)

def test_who_else_changes_the_rate():
    "What others make of it between epochs stays, and comes on top"
    class Halves(Callback):
        def after_epoch(self):
            for h in self.opt.hypers: h['lr'] /= 2
    rates = [o[3] for o in fit({0:64, 1:256}, lr_power=.5, cbs=[Halves()])[2].rows]
    assert sorted({round(o, 9) for o in rates}, reverse=True)==[1e-3, .5e-3, .25e-3]
    learn = plain_learner()
    fit({0:64, 1:256}, learn, lr_power=.5, cbs=[Halves()])
    assert learn.opt.hypers[-1]['lr']==pytest.approx(1e-3/16)

@pytest.mark.parametrize('opt_func', [Adam, lambda p, **kw: OptimWrapper(p, torch.optim.AdamW)])
def test_rates_of_all_optimizers(opt_func):
    "PyTorch's too, also where somebody predicts in the middle of an epoch, or trains on at what happens to be the moved rate"
    class Predicts(Callback):
        def after_batch(self):
            if not (self.training and self.iter==3): return
            keep = self.learn.dl,self.learn.n_iter,self.learn.iter
            self.learn.get_preds()
            self.learn.dl,self.learn.n_iter,self.learn.iter = keep
            self.model.train()
            self.learn.training = True
    def rates(cbs):
        learn = plain_learner(opt_func=opt_func)
        _,cb,steps = fit({0:64, 1:256}, learn, lr_power=.5, epochs=2, cbs=cbs)
        return learn,{o[3] for o in steps.rows}
    learn,plain = rates([])
    assert plain=={1e-3,2e-3} and learn.opt.hypers[-1]['lr']==1e-3
    learn,disturbed = rates([Predicts()])
    assert disturbed <= {1e-3,2e-3} and learn.opt.hypers[-1]['lr']==1e-3
    cb = BatchSizeSchedule({0:64, 1:256}, lr_power=.5)
    learn.add_cb(cb)
    class Ends(Callback):
        def before_validate(self):
            if self.epoch==1: raise KeyboardInterrupt
    class Breaks(Callback):
        order = 90
        def before_step(self):
            if self.epoch==1: raise KeyboardInterrupt
    for end in (Ends,Breaks):
        with pytest.raises(KeyboardInterrupt), learn.no_logging(): learn.fit(2, 1e-3, cbs=end())
        steps = Steps()
        with learn.no_logging(): learn.fit(1, 2e-3, cbs=steps)
        assert {o[3] for o in steps.rows}=={2e-3}

@pytest.mark.parametrize('loss', [partial(F.cross_entropy, reduction='sum'), lambda p, y: F.cross_entropy(p, y).sqrt()])
def test_losses_of_all_kinds(loss):
    "Sums that nobody calls so; and losses that need their value for the backward pass"
    def first(**kwargs):
        learn = plain_learner(n=192, loss=loss)
        learn.dls.train.shuffle = False
        return fit({0:192}, learn, epochs=1, **kwargs)[2].rows[0][4]
    whole,parts = first(),first(max_bs=64)
    if isinstance(loss, partial): assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)
    else: assert .9 < float(parts.norm()/whole.norm()) < 1.1

def test_other_loaders_within_a_training():
    other,seen = plain_learner(bs=32).dls,[]
    class Swap(Callback):
        def before_epoch(self):
            if self.epoch==1: self.learn.dls = other
    class Look(Callback):
        def after_batch(self):
            if self.training: seen.append((self.epoch, self.dl is other.train, len(self.yb[0])))
    learn = plain_learner()
    with learn.no_logging(): learn.fit(3, 1e-3, cbs=[Swap(), BatchSizeSchedule({2:64}), Look()])
    assert set(seen)=={(0,False,64),(1,True,32),(2,False,64)}

def test_without_a_recorder_and_in_the_middle():
    learn = plain_learner()
    learn.remove_cb(Recorder)
    learn.fit(1, 1e-3, cbs=BatchSizeSchedule(lambda p: torch.tensor(128)))
    class Adds(Callback):
        def after_batch(self):
            if self.train_iter==3 and self.training: self.learn.add_cbs([BatchSizeSchedule({0:128}), NoiseScaleMonitor(every=1)])
    learn = plain_learner()
    with learn.no_logging(): learn.fit(2, 1e-3, cbs=Adds())
    assert learn.batch_size_schedule.history[-1][1]==128 and len(learn.recorder.bs_find_stats)

def test_progress_and_everything_that_goes_by_it():
    learn,cb,steps = fit({0:32, 1:64, 2:256}, make_learner(), epochs=3, fit='fit_one_cycle')
    pct = [o[1] for o in steps.rows]
    assert np.all(np.diff(pct) > 0) and pct[0]==0 and .9 < pct[-1] < 1
    assert [min(o[1] for o in steps.rows if o[0]==e) for e in range(3)]==pytest.approx([0,1/3,2/3])
    assert len(learn.recorder.values)==3 and len(learn.recorder.losses)==sum(steps.n_iters)==len(learn.recorder.hps['lr'])

def test_progress_bar():
    learn = make_learner()
    learn.add_cb(ProgressCallback())
    totals = []
    class Look(Callback):
        order = 70
        def before_train(self): totals.append(self.progress.pbar.total)
    with learn.no_logging(): learn.fit(2, 1e-3, cbs=[BatchSizeSchedule({0:64, 1:128}), Look()])
    assert totals==[22,11]

def test_start_epoch():
    _,_,steps = fit({0:64, 2:256})
    learn,again = plain_learner(),Steps()
    with learn.no_logging(): learn.fit(4, 1e-3, start_epoch=2, cbs=[BatchSizeSchedule({0:64, 2:256}), again])
    assert [o[:3] for o in again.rows]==[o[:3] for o in steps.rows if o[0] >= 2]

@pytest.mark.parametrize('how', ['fit','fit_one_cycle'])
def test_resumed(how, tmp_path):
    "Saved after two epochs and resumed, it ends with the same bits: batches, rates, accumulation"
    def run(first, then):
        set_seed(0)
        learn = make_learner(tmp_path)
        learn.dls.train.rng = random.Random(0)
        rows = []
        for start,end in (first,then):
            cb = BatchSizeSchedule({0:32, 1:64, 2:160, 3:512}, lr_power=.5, max_bs=128)
            class Ends(Callback):
                def before_epoch(self):
                    if self.epoch==end: raise CancelFitException()
            kwargs = dict(start_epoch=start) | (dict(reset_opt=False) if start else {})
            with learn.no_logging(): getattr(learn, how)(4, 1e-3, cbs=[cb, Ends()], **kwargs)
            rows += [n for _,n in cb.history]
            learn.save('x')
            rng,order = torch.get_rng_state(),learn.dls.train.rng.getstate()
            learn = make_learner(tmp_path).load('x')
            torch.set_rng_state(rng)
            learn.dls.train.rng.setstate(order)
        return rows,[*learn.model.parameters()]
    (a,w),(b,v) = run((0,2), (2,4)),run((0,4), (4,4))
    assert a==b and same(w, v)

def test_export(tmp_path):
    "A learner that keeps one is exported as others are, and goes on with it"
    df = small_table()
    procs = [Categorify,FillMissing,Normalize]
    dls = TabularDataLoaders.from_df(df, procs=procs, cat_names='kind', cont_names=['a','b'], y_names='y', bs=16)
    learn = tabular_learner(dls, layers=[8], path=tmp_path, cbs=BatchSizeSchedule({0:16, 1:64}))
    with learn.no_logging(), learn.no_bar(): learn.fit(2, 1e-3)
    learn.export('x.pkl')
    with learn.no_bar(): expected = learn.predict(df.iloc[0])[2]
    again = load_learner(tmp_path/'x.pkl')
    with again.no_bar(): assert torch.equal(again.predict(df.iloc[0])[2], expected)
    again.dls = dls
    with again.no_logging(), again.no_bar(): again.fit(2, 1e-3)
    assert [n for _,n in again.batch_size_schedule.history][-1]==64

def test_fine_tune_and_clipping():
    learn = plain_learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], metrics=accuracy)
    learn.add_cb(BatchSizeSchedule(SchedExp(64, 512), lr_power=.5))
    with learn.no_logging(): learn.fine_tune(2, 1e-3, cbs=GradientClip(.1))
    history = learn.batch_size_schedule.history
    assert history[0][1]==64 and history[-1][1] > 256 # the second of two fits has gone through all of it, too

def test_pytorch_loaders():
    "Can't be made anew, so all is accumulated; without max_bs that is said"
    def torch_learner():
        learn = plain_learner()
        items = [(torch.as_tensor(x), int(y)) for x,y in learn.dls.train_ds[:1408]]
        learn.dls = DataLoaders(*(torch.utils.data.DataLoader(items, batch_size=64) for _ in range(2)))
        return learn
    _,_,steps = fit({0:64, 1:192}, torch_learner(), epochs=2, max_bs=64)
    assert sizes(steps, 0)==[64]*22 and sizes(steps, 1)==[192]*7+[64]
    with pytest.raises(ValueError, match='DataLoader.*pass max_bs=64'): fit({0:64, 1:192}, torch_learner(), epochs=2)

class Stop(Callback):
    order = 80
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.train_iter==30: raise self.error

@pytest.mark.parametrize('error', [KeyboardInterrupt(), ValueError('mine'), CancelFitException()])
@pytest.mark.parametrize('stays', [False,True])
def test_interrupts(error, stays):
    "The learner has its loader again; where the callback stays on it after an error, with the next training at the latest"
    learn = plain_learner()
    dl,cb = learn.dls.train,BatchSizeSchedule({0:64, 1:128}, lr_power=2)
    if stays: learn.add_cb(cb)
    try:
        with learn.no_logging(): learn.fit(3, 1e-3, cbs=[Stop(error)]+[cb]*(not stays))
    except (KeyboardInterrupt,ValueError): pass
    assert learn.dls.train is dl
    steps = Steps()
    with learn.no_logging(): learn.fit(2, 1e-5, cbs=steps)
    assert {o[2] for o in steps.rows}==({64,128} if stays else {64})
    assert {o[3] for o in steps.rows}==({1e-5,4e-5} if stays else {1e-5})
    assert not vars(pickle.loads(pickle.dumps(cb)) if not stays else cb)['loaders']

@pytest.mark.parametrize('kwargs,why', [
    (dict(sched=64), 'sched must be'), (dict(sched={}), 'sched must be'), (dict(sched={0:64}, lr_power='x'), 'lr_power must be'),
    (dict(sched={0:64}, max_bs=0), 'max_bs must be'), (dict(sched={'0':64}), 'must be epochs'),
    (dict(sched={-1:64}), 'must be epochs')])
def test_refuses(kwargs, why):
    with pytest.raises(ValueError, match=why): BatchSizeSchedule(**kwargs)

@pytest.mark.parametrize('sched,cbs,why', [
    ({0:0}, [], 'at least 1'), (lambda p: math.nan, [], 'at least 1'), (lambda p: math.inf, [], 'at least 1'),
    ({0:64}, [GradientAccumulation(128)], 'remove one of them')])
def test_refuses_in_a_training(sched, cbs, why):
    learn = plain_learner()
    dl = learn.dls.train
    with pytest.raises(ValueError, match=why): fit(sched, learn, cbs=cbs)
    assert learn.dls.train is dl

def test_more_than_there_is():
    _,_,steps = fit({0:10**6}, epochs=1)
    assert sizes(steps, 0)==[1437]

def test_with_the_monitor():
    "Steps of one batch and of several are both watched"
    learn,monitor = plain_learner(),NoiseScaleMonitor(every=1)
    fit(lambda p: 64 if p < .5 else 256, learn, epochs=2, max_bs=64, cbs=[monitor])
    sizes = [r[3] for r in monitor.running.rows]
    assert set(sizes)=={64,128,256} and learn.recorder.search.window==256 # 128: the end of an epoch

def test_lr_find_leaves_both_out():
    "It counts on the epochs that the loader has"
    def found(cbs):
        learn = plain_learner(cbs=cbs)
        with learn.no_bar(): lr = learn.lr_find(show_plot=False)
        return lr,len(learn.recorder.losses),learn.recorder.metrics
    assert found([BatchSizeSchedule({0:256}), NoiseScaleMonitor(every=1)])==found([])

def test_searches_and_validations_leave_it_out():
    learn = make_learner(cbs=BatchSizeSchedule({0:128}))
    dl = learn.dls.train
    search(learn)
    assert learn.recorder.train_bs==64
    learn.validate(), learn.get_preds()
    assert learn.dls.train is dl
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert len(learn.recorder.losses)==11 and learn.dls.train is dl
