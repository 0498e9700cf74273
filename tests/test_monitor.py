"The monitor: a training with it is the one without it, bit for bit, and what it says is right."
import json, math, random, time

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import *
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import set_seed
from fastai_bs_finder import monitor as module
from fastai_bs_finder.all import *
from fastai_bs_finder.monitor import Budget, Window
from helpers import digits, make_learner, plain_learner, same, search, small_table
from measuring import assert_close, exact, learner, standing, trained

columns = ['noise','scale','noise_scale','lower','upper']

def twice(x): return torch.cat([x,x], 1)

class CountsPasses(nn.Module):
    "Draws a random number in each forward pass and counts them in a buffer"
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.register_buffer('n', torch.zeros(1))
    def forward(self, x):
        self.n += 1
        return self.head(x.flatten(1))*(1+.1*torch.rand(1))

def counting(): return plain_learner(model=CountsPasses())
def recurrent():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = nn.LSTM(8, 16, 2, batch_first=True, dropout=.3),nn.Linear(16,10)
        def forward(self, x): return self.head(self.rnn(x.squeeze(1))[0][:,-1])
    return plain_learner(model=Rows())
def checkpointed():
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.Dropout(.5)),nn.Linear(32,10)
        def forward(self, x): return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False))
    return plain_learner(model=Saves())

def batch_norm_checkpointed():
    "Its batch norm counts in the backward pass, too, where the forward pass is made anew"
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.BatchNorm1d(32)),nn.Linear(32,10)
        def forward(self, x): return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False))
    return plain_learner(model=Saves())
class Centred(nn.Module):
    "A loss with a running mean"
    def __init__(self):
        super().__init__()
        self.register_buffer('centre', torch.zeros(10))
    def forward(self, pred, y):
        self.centre += .1*(pred.detach().mean(0)-self.centre)
        return nn.functional.cross_entropy(pred-self.centre, y)
def counting_loss(): return plain_learner(loss=Centred())

makers = dict(
    plain=make_learner, metrics=lambda: make_learner(metrics=accuracy), workers=lambda: make_learner(num_workers=1),
    sgd=lambda: make_learner(opt_func=SGD),
    torch_opt=lambda: make_learner(opt_func=lambda p, **kw: OptimWrapper(p, torch.optim.AdamW)),
    sums=lambda: plain_learner(loss=CrossEntropyLossFlat(reduction='sum')),
    smooth=lambda: plain_learner(loss=LabelSmoothingCrossEntropyFlat()),
    buffers=counting, lstm=recurrent, checkpoint=checkpointed, checkpoint_bn=batch_norm_checkpointed,
    loss_buffer=counting_loss)
callbacks = dict(
    none=[], mixup=[MixUp], cutmix=[CutMix], clip=[lambda: GradientClip(.1)], accumulate=[lambda: GradientAccumulation(150)],
    both=[MixUp, lambda: GradientAccumulation(256), lambda: GradientClip(.1)], one_by_one=[lambda: GradientAccumulation(64)])
pairs = [(o,'none') for o in makers] + [(o,c) for o in ('plain','sums') for c in callbacks if c!='none']

@pytest.mark.parametrize('maker,cbs', pairs)
def test_bit_for_bit(maker, cbs):
    "Weights, buffers, the optimizer, losses, metrics and all sources of random numbers; and it has measured"
    _,without = trained(makers[maker], callbacks[cbs])
    learn,got = trained(makers[maker], callbacks[cbs], monitor=NoiseScaleMonitor(every=1))
    assert same(without, got)
    stats = learn.recorder.bs_find_stats
    assert len(stats) >= (5 if 'cc' in cbs or cbs=='both' else 40) and (stats.noise > 0).all()
    assert not any(p._backward_hooks for p in learn.model.parameters())

@pytest.mark.parametrize('kwargs', [dict(), dict(bs=7), dict(loss=CrossEntropyLossFlat(reduction='sum')), dict(bs=2)])
def test_is_right(kwargs):
    "Noise and scale of a batch drawn from 128 items, against the gradients of single items; odd batches and sums, too"
    learn,got = standing(**kwargs)
    assert_close(got, exact(learner(**{k:v for k,v in kwargs.items() if k!='loss'})), tol=.12)

@pytest.mark.parametrize('n_acc,loss', [(16,None), (24,None), (40,CrossEntropyLossFlat(reduction='sum'))])
def test_accumulated_gradients_are_right(n_acc, loss):
    "Batches of 8, also where they are not as many as the sum is divided by (24 of 20 items)"
    n = n_acc-4 if n_acc==24 else n_acc
    learn,got = standing(cbs=[GradientAccumulation(n)], n=60, loss=loss)
    assert learn.recorder.search.window==n_acc and learn.recorder.search.micro_bs==8 and learn.recorder.search.train_bs==n_acc
    assert_close(got, exact(learner()), tol=.15)

@pytest.mark.parametrize('every', [2,3,4,8,13])
def test_every_so_many_batches_where_several_make_a_step(every):
    "With the step that begins then, at the latest with the next one"
    learn = plain_learner()
    with learn.no_logging(): learn.fit(3, 1e-3, cbs=[GradientAccumulation(256), NoiseScaleMonitor(every=every)])
    n,began = len(learn.recorder.bs_find_stats),66//(max(every, 4)+3)
    assert began <= n <= 66/max(every, 4)

def test_where_several_make_a_step_only_windows_count(monkeypatch):
    "Also where time for a measurement is found after the first of them has begun"
    learn,state = plain_learner(),[]
    class Late(Callback):
        order = 99
        def before_batch(self): state.append(1)
        def after_batch(self): state.clear()
    monkeypatch.setattr(NoiseScaleMonitor, 'due', lambda self: bool(state))
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[GradientAccumulation(256), NoiseScaleMonitor(every=1), Late()])
    assert not len(learn.recorder.bs_find_stats)

def test_clipping_comes_later():
    _,plain = standing(n=5)
    _,clipped = standing(n=5, cbs=[GradientClip(1e-6)])
    assert plain==clipped

def test_frozen_layers_do_not_count():
    def half():
        learn = plain_learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
        learn.freeze()
        return learn
    learn = half()
    monitor = NoiseScaleMonitor(every=2)
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=monitor)
    frozen = monitor.running.means()
    rows = len(monitor.running.rows)
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=monitor)
    assert len(monitor.running.rows)==2*rows # goes on
    learn.unfreeze()
    with learn.no_logging(): learn.fit(1, 1e-12, cbs=monitor)
    assert len(monitor.running.rows)==rows and monitor.running.means()[0] > frozen[0]

# --- where it is seen

def test_columns(tmp_path):
    "In the recorder's values, and whatever goes by them; afterwards the learner has its own metrics only"
    learn,log = make_learner(tmp_path, metrics=accuracy),CSVLogger()
    with learn.no_logging(): learn.fit(3, 1e-3, cbs=[NoiseScaleMonitor(every=3), log, SaveModelCallback(monitor='noise_scale')])
    rec = learn.recorder
    assert list(rec.metric_names)==['epoch','train_loss','valid_loss','accuracy',*columns,'time']
    rows = rec.bs_find_stats.loc[[o for o in (21,42,66)], columns]
    assert np.allclose([list(o)[3:] for o in rec.values], rows.to_numpy())
    assert np.allclose(pd.read_csv(tmp_path/'history.csv')[columns], rows)
    assert len(learn.validate())==2 and list(learn.metrics.attrgot('name'))==['accuracy']
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert list(rec.metric_names)==['epoch','train_loss','valid_loss','accuracy','time'] and len(rec.bs_find_stats)==22

def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner(tmp_path)
    board = TensorBoardCallback(tmp_path/'runs', trace_model=False, log_preds=False)
    with learn.no_logging(): learn.fit(2, 1e-3, cbs=[NoiseScaleMonitor(every=3), board])
    events = EventAccumulator(str(tmp_path/'runs')).Reload()
    assert np.isclose(events.Scalars('noise_scale')[-1].value, learn.recorder.noise_scale[-1])

def test_validation_is_no_training():
    "With a monitor that stays on the learner: no columns of its own, and the record stays"
    learn = make_learner(metrics=accuracy, cbs=NoiseScaleMonitor(every=1))
    assert len(learn.validate())==2
    with learn.no_logging(): learn.fit(1, 1e-3)
    stats = learn.recorder.bs_find_stats
    assert len(learn.recorder.values[0])==8 and len(learn.validate())==2
    learn.get_preds()
    assert stats.equals(learn.recorder.bs_find_stats) and len(stats)==21
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert len(learn.recorder.values[0])==8

def test_nothing_measured_yet():
    learn = make_learner()
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=NoiseScaleMonitor(every=1000))
    assert all(np.isnan(o) for o in learn.recorder.values[0][2:]) and not len(learn.recorder.bs_find_stats)

def test_a_picture_and_a_table():
    learn = make_learner()
    with learn.no_logging(): learn.fit_one_cycle(3, 1e-3, cbs=NoiseScaleMonitor(every=1))
    fig = learn.recorder.plot_bs_find(losses=True, return_fig=True)
    lines = {o.get_ylabel(): o.lines for o in fig.axes}
    assert len(lines['Loss'][0].get_xdata())==len(learn.recorder.losses)==66
    with learn.no_logging(): learn.fit(1, 1e-3), learn.validate() # not watched, so the picture stays what it was
    fig = learn.recorder.plot_bs_find(losses=True, return_fig=True)
    assert len({o.get_ylabel(): o.lines for o in fig.axes}['Loss'][0].get_xdata())==66
    table = learn.recorder.bs_table()
    assert 64 in table.index and table.lr[64]==pytest.approx(1e-3, rel=.01)
    with learn.no_logging(): learn.fit_one_cycle(3, 1e-3, cbs=NoiseScaleMonitor(every=40)) # of the whole training, not of one batch
    assert learn.recorder.search.lr==pytest.approx(1e-3, rel=.01)
    assert 'critical batch size' in learn.recorder.bs_find_summary()

def test_no_losses_to_draw_of_a_search():
    learn = make_learner()
    search(learn)
    with pytest.raises(ValueError, match='a search is no training'): learn.recorder.plot_bs_find(losses=True)

# --- what it costs

def test_keeps_to_its_budget():
    "What has been spent is a share of the training's time, but for the first measurement"
    learn,monitor = make_learner(),NoiseScaleMonitor(cost=.1)
    with learn.no_logging(): learn.fit(8, 1e-3, cbs=monitor)
    b = monitor.budget
    assert b.spent <= .1*(b.elapsed-b.spent)+b.last and len(learn.recorder.noise) > 1

def test_validations_are_no_time_of_the_training():
    class Slow(Callback):
        run_train,n = False,0
        def after_pred(self): self.n += 1; time.sleep(.05)
    learn,monitor,slow = plain_learner(),NoiseScaleMonitor(),Slow()
    start = time.perf_counter()
    with learn.no_logging(): learn.fit(2, 1e-3, cbs=[monitor, slow])
    assert slow.n and monitor.budget.elapsed < time.perf_counter()-start-slow.n*.05

def test_a_budget_measures(monkeypatch):
    now = [0.]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now[0])
    budget = Budget(.1)
    budget.go()
    def measure():
        budget.begin()
        for o in (1.,2.):
            with budget.spend(torch.device('cpu')): now[0] += o
    assert budget.allows()
    measure()
    assert (budget.spent,budget.last)==(3.,3.)
    for t,expected in ((20.,False), (39.,False), (40.,False), (43.,False), (63.1,True)):
        now[0] = t
        assert budget.allows()==expected
    measure()
    assert budget.spent==pytest.approx(6.)

# --- what goes wrong

class Total(nn.Module):
    def __init__(self): super().__init__(); self.head = nn.Linear(64, 10)
    def forward(self, x): return self.head(x.flatten(1)).square().sum()
def total(): return plain_learner(model=Total(), loss=lambda pred, y: pred)

class Once(torch.autograd.Function):
    "Can be gone through only once, as graphs that were compiled"
    @staticmethod
    def forward(ctx, x): ctx.n = 0; return x.clone()
    @staticmethod
    def backward(ctx, g):
        if not torch._C._autograd._get_current_graph_task_keep_graph(): return g
        raise RuntimeError('this graph can be gone through only once')
class OnceModel(nn.Module):
    def __init__(self): super().__init__(); self.head = nn.Linear(64, 10)
    def forward(self, x): return Once.apply(self.head(x.flatten(1)))
def once(): return plain_learner(model=OnceModel())

class Two(nn.Module):
    "Two predictions, one of them computed from the other"
    def __init__(self): super().__init__(); self.body,self.head = nn.Linear(64,10),nn.Linear(10,10)
    def forward(self, x):
        res = self.body(x.flatten(1))
        return res,self.head(res)
def two_losses(pred, y): return nn.functional.cross_entropy(pred[1], y)+.5*pred[0].square().mean()
def two(): return plain_learner(model=Two(), loss=two_losses)
class Turned(nn.Module):
    "Time comes first, then the items"
    def __init__(self): super().__init__(); self.head = nn.Linear(8, 10)
    def forward(self, x): return self.head(x.squeeze(1).transpose(0, 1))
def turned(): return plain_learner(model=Turned(), loss=lambda pred, y: nn.functional.cross_entropy(pred.mean(0), y))
def unconnected():
    learn = plain_learner()
    learn.loss_func = lambda pred, y: sum(p.square().sum() for p in learn.model.parameters())
    return learn
class Dense(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.head = nn.Embedding(99, 4, sparse=True),nn.Linear(256, 10)
    def forward(self, x): return self.head(self.emb((x.flatten(1)*16).long()).flatten(1))
def sparse(): return plain_learner(model=Dense(), opt_func=lambda p, **kw: OptimWrapper(p, torch.optim.SGD))
def noisy_hooks():
    learn = plain_learner()
    for p in learn.model.parameters(): p.register_hook(lambda g: g+.01*torch.randn_like(g))
    return learn
class Drops(DataLoader):
    "Items that can't be read are left out"
    n_made = 0
    def create_batch(self, b):
        self.n_made += 1
        return super().create_batch(b[:-1] if self.n_made%5==4 else b)
def dropping():
    learn = plain_learner()
    learn.dls = DataLoaders(Drops(learn.dls.train.dataset, bs=64, shuffle=True, num_workers=0), learn.dls.valid)
    return learn

@pytest.mark.filterwarnings('error:The noise scale is not watched')
@pytest.mark.parametrize('make', [sparse, noisy_hooks, dropping])
def test_goes_on_watching(make):
    "Sparse gradients, hooks that draw random numbers, batches that are a little short"
    _,without = trained(make)
    learn,got = trained(make, monitor=NoiseScaleMonitor(every=1))
    assert same(without, got) and len(learn.recorder.bs_find_stats) > 40

@pytest.mark.parametrize('cbs', [[],[GradientAccumulation(256)]])
@pytest.mark.filterwarnings('error:The noise scale is not watched')
def test_parameters_that_come_and_go_within_a_training(cbs):
    "The averages begin anew with them"
    class Gradual(Callback):
        def before_epoch(self):
            if self.epoch==1: self.learn.unfreeze()
            if self.epoch==2: self.model[0].requires_grad_(False)
    learn = plain_learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    learn.freeze()
    monitor,ns = NoiseScaleMonitor(every=1),[]
    class Look(Callback):
        order = 20
        def after_epoch(self): ns.append((len(monitor.names), len(monitor.running.rows), self.iter))
    with learn.no_logging(): learn.fit(3, 1e-3, cbs=[Gradual(), monitor, Look(), *cbs])
    assert [o[0] for o in ns]==[2,4,2] and max(o[1] for o in ns) <= 22

def test_predictions_in_between():
    "Somebody predicts after each epoch: the columns stay"
    class Predicts(Callback):
        order,busy = 65,False
        def after_epoch(self):
            if self.busy: return
            self.busy = True
            self.learn.get_preds()
            self.busy = False
    learn,rows = plain_learner(metrics=accuracy),[]
    learn.logger = rows.append
    learn.fit(3, 1e-3, cbs=[Predicts(), NoiseScaleMonitor(every=3)])
    assert {len(o) for o in rows}=={10}

class Scales(nn.Module):
    "Has a part that is called as fastai calls what scales losses"
    def __init__(self): super().__init__(); self.scaler,self.head = nn.Identity(),nn.Linear(64,10)
    def forward(self, x): return self.head(self.scaler(x.flatten(1)))

def test_names_of_models_are_theirs():
    learn,got = trained(lambda: plain_learner(model=Scales()), monitor=NoiseScaleMonitor(every=1))
    assert len(learn.recorder.bs_find_stats) > 40
    search(learn)
    assert len(learn.recorder.bs_find_stats)==3

@pytest.mark.parametrize('make,why', [
    (total, 'those of a batch of 64 items have the first dimensions'), (once, 'only once'),
    (two, 'times as long as that of the training'), (turned, r'the first dimensions \[8\]'), (unconnected, "the loss doesn't depend on the predictions")])
def test_training_goes_on(make, why):
    "Without us, bit for bit, and the reason is told once"
    _,without = trained(make)
    with pytest.warns(UserWarning, match=why) as said: learn,got = trained(make, monitor=NoiseScaleMonitor(every=1))
    assert same(without, got) and len([o for o in said if 'is not watched' in str(o.message)])==1
    assert all(np.isnan(o) for o in learn.recorder.values[-1][2:])

def test_out_of_memory(monkeypatch):
    def full(*args): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(module, 'weighted_gradients', full)
    with pytest.warns(UserWarning, match='CUDA out of memory'): _,got = trained(make_learner, monitor=NoiseScaleMonitor(every=1))
    assert same(got, trained(make_learner)[1])

class Stop(Callback):
    order = 80
    def __init__(self, at, error): self.at,self.error = at,error
    def before_step(self):
        if self.train_iter==self.at: raise self.error

@pytest.mark.parametrize('acc', [False,True])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), ValueError('mine')])
def test_interrupts(acc, error):
    "Nothing stays on the learner, and the record is kept"
    learn = make_learner()
    cbs = [GradientAccumulation(256)]*acc
    with pytest.raises(type(error)), learn.no_logging():
        learn.fit(2, 1e-3, cbs=[NoiseScaleMonitor(every=1), Stop(15, error), *cbs])
    assert not any(p._backward_hooks for p in learn.model.parameters()) and 'watched' not in vars(learn.recorder)
    assert len(learn.recorder.bs_find_stats) and len(learn.validate())==1

class Skips(Callback):
    "Cancels batches now and then, before or after the backward pass"
    def __init__(self, event, order): self.order = order; setattr(self, event, self.maybe)
    def maybe(self):
        if self.training and self.train_iter%3==0: raise CancelBatchException()

def test_no_backward_pass():
    class Skip(Callback):
        order = -60
        def before_backward(self): raise CancelBackwardException()
    learn,got = trained(makers['plain'], [Skip], monitor=NoiseScaleMonitor(every=1))
    assert same(got, trained(makers['plain'], [Skip])[1]) and not len(learn.recorder.bs_find_stats)

def test_no_backward_pass_now_and_then():
    "The zeros that are there instead are no gradient"
    class Skip(Callback):
        order = 99
        def before_backward(self):
            if self.iter%2: raise CancelBackwardException()
    _,plain = standing(n=20)
    _,skipped = standing(n=20, cbs=[Skip()])
    assert_close(skipped, plain, tol=.15)

@pytest.mark.parametrize('event,order', [
    ('before_batch',0), ('after_loss',0), ('before_backward',99), ('after_backward',99), ('before_step',0)])
def test_cancelled_batches(event, order):
    "What they leave in the gradients is not taken for the next batch's"
    cbs = [lambda: Skips(event, order)]
    learn,got = trained(makers['plain'], cbs, monitor=NoiseScaleMonitor(every=1))
    assert same(got, trained(makers['plain'], cbs)[1])
    stats = learn.recorder.bs_find_stats
    if event in ('before_step','after_backward'): assert not stats.index.isin(range(2, 40, 3)).any()

def test_nan_is_left_out():
    class Spoils(Callback):
        def after_loss(self):
            if self.training and self.train_iter==5: self.learn.loss_grad = self.loss_grad*math.nan
    learn = plain_learner()
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[Spoils(), NoiseScaleMonitor(every=1)])
    assert 6 not in learn.recorder.bs_find_stats.index

@pytest.mark.parametrize('kwargs', [dict(every=0), dict(every=1.5), dict(cost=0), dict(cost=2), dict(cost='x'), dict(tol=0)])
def test_refuses(kwargs):
    with pytest.raises(ValueError, match=f'{list(kwargs)[0]} must be'): NoiseScaleMonitor(**kwargs)

# --- other things of the package and of fastai

def test_searches_leave_it_out():
    learn = make_learner()
    learn.add_cb(NoiseScaleMonitor(every=1))
    search(learn)
    assert len(learn.recorder.bs_find_stats)==3
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert len(learn.recorder.bs_find_stats) > 3

def test_export(tmp_path):
    "A learner that has one is exported as others are"
    df = small_table()
    procs = [Categorify,FillMissing,Normalize]
    dls = TabularDataLoaders.from_df(df, procs=procs, cat_names='kind', cont_names=['a','b'], y_names='y', bs=32)
    learn = tabular_learner(dls, layers=[8], path=tmp_path, cbs=NoiseScaleMonitor(every=1))
    with learn.no_logging(), learn.no_bar(): learn.fit(1, 1e-3)
    learn.export('x.pkl')
    with learn.no_bar(): expected = learn.predict(df.iloc[0])[2]
    again = load_learner(tmp_path/'x.pkl')
    with again.no_bar(): assert torch.equal(again.predict(df.iloc[0])[2], expected)
    before = learn.noise_scale_monitor.running.rows
    assert again.noise_scale_monitor.running.rows==before!=[]
    again.dls = dls
    with again.no_logging(), again.no_bar(): again.fit(1, 1e-3)
    rows = again.noise_scale_monitor.running.rows
    assert rows[:len(before)]==before and len(rows) > len(before)

def test_goes_on_in_another_session(tmp_path):
    "A training that was saved and resumed has the same averages, to the last bit"
    def fit(learn, monitor):
        with learn.no_logging(): learn.fit(2, 1e-3, cbs=monitor, reset_opt=False)
        return learn
    def run(again):
        set_seed(0, reproducible=True)
        learn,a = plain_learner(path=tmp_path),NoiseScaleMonitor(every=3)
        learn.dls.train.rng = random.Random(0)
        fit(learn, a).save('x')
        order = learn.dls.train.rng.getstate()
        if again:
            state = json.loads(json.dumps(a.state_dict()))
            learn,a = plain_learner(path=tmp_path).load('x'),NoiseScaleMonitor(every=3)
            a.load_state_dict(state)
        learn.dls.train.rng.setstate(order)
        return fit(learn, a),a
    (learn,a),(other,b) = run(False),run(True)
    assert same([*learn.model.parameters()], [*other.model.parameters()])
    assert a.n_seen==b.n_seen==88 and len(a.running.rows)==28 and a.running.rows==b.running.rows
    assert a.running.means()==b.running.means()

def test_no_memory_is_kept():
    learn = make_learner()
    monitor = NoiseScaleMonitor(every=1)
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=monitor)
    assert not monitor.params and monitor.sq is None and monitor.window is None
