"Callbacks and optimizers beside a search: they change no measurement, and work on afterwards."
import sys, sysconfig, types, warnings
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import Adam, Lamb, RMSProp, SGD
from fastai.vision.gan import basic_critic, basic_generator, GANLearner
from torch import nn, tensor
from fastai_bs_finder.all import BSFinder
from fastai_bs_finder.callbacks import takes_part
from helpers import digits, disk
from measuring import (
    assert_close, assert_far, assert_same, drowned_is_fine, each_method, exact, Grads, learner, measure, stats, torch_opt)

pytestmark = drowned_is_fine

@each_method
def test_gradients_are_measured_before_clipping(method):
    "A clip that would leave nothing of the gradient changes no measurement"
    plain,clipped = stats(learner(), method),learner(cbs=GradientClip(1e-3))
    assert_same(plain, stats(clipped, method))
    grads = Grads()
    grads.order = GradientClip.order+1
    with clipped.no_logging(): clipped.fit(1, 1e-12, cbs=grads)
    assert max(g.norm() for g in grads.all) < 1.1e-3 # the callback is still there and clips

decaying = [partial(Adam, decouple_wd=False), Adam, SGD, torch_opt(torch.optim.SGD)]

@pytest.mark.parametrize('opt', decaying, ids=['l2','adam','sgd','torch'])
@each_method
def test_weight_decay_does_not_count(opt, method):
    "Neither the learner's nor the search's own, though it enters the gradient when the optimizer steps"
    plain = stats(learner(opt_func=opt), method, wd=0.)
    assert_same(plain, stats(learner(opt_func=opt), method, wd=.5))
    assert_same(plain, stats(learner(opt_func=opt, wd=.5), method))

@each_method
def test_gradient_accumulation_is_left_out(method):
    "It changes no measurement, and works on in the next training: a step every 32 items"
    learn = learner(cbs=GradientAccumulation(32))
    assert_same(stats(learner(), method), stats(learn, method))
    steps = []
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=Callback(after_step=lambda self: steps.append(learn.train_iter)))
    assert len(learn._grab_cbs(GradientAccumulation))==1 and len(steps)==4

@pytest.mark.parametrize('opt', [torch_opt(torch.optim.AdamW), torch_opt(torch.optim.SGD, momentum=.9), SGD, Lamb, RMSProp],
    ids=['AdamW','SGD','fastai SGD','Lamb','RMSProp'])
@each_method
def test_optimizers(opt, method):
    "The gradient is there before the optimizer: all measure the same"
    learn = learner(opt_func=opt)
    assert_same(stats(learner(), method), stats(learn, method), 1e-4)
    with learn.no_logging(): learn.fit(1, 1e-3)
    if method=='accumulate': # for `split` the signal is too weak after training, with so few pairs of 2 and 8
        assert_close(measure(learn, method), exact(learn))

# --- callbacks that write or stop

def saved(learn): return (learn.path/'models'/'model.pth').exists()

def saved_each(learn): return [o.name for o in sorted((learn.path/'models').iterdir())]==[f'each_{i}.pth' for i in range(4)]

def stopped(learn): return len(learn.recorder.values)==2

def reduced(learn): return abs(learn.opt.hypers[-1]['lr']/1e-5-1) < 1e-6

def logged(learn): return list(learn.csv_logger.read_log().epoch)==[0,1,2,3] and learn.logger is print

hopeless = dict(min_delta=1e6, patience=1) # no epoch after the first is an improvement

trackers = dict(save=(SaveModelCallback, saved),
    save_each=(partial(SaveModelCallback, every_epoch=True, fname='each'), saved_each),
    stop=(partial(EarlyStoppingCallback, **hopeless), stopped), reduce=(partial(ReduceLROnPlateau, **hopeless), reduced),
    csv=(CSVLogger, logged))

@pytest.mark.parametrize('first,method', [('search','accumulate'), ('search','split'), ('fit','accumulate')])
@pytest.mark.parametrize('nm', trackers)
def test_callbacks_that_write_or_stop(nm, first, tmp_path, method, capsys):
    "In a search of several epochs they write nothing, stop nothing and change no measurement; in a training they do"
    cb,done = trackers[nm]
    learn = learner(path=tmp_path, cbs=cb())
    learn.logger = print
    if first=='fit': learn.fit(4, 1e-2)
    before,hypers = disk(tmp_path),deepcopy(list(learn.opt.hypers)) if learn.opt else None
    capsys.readouterr()
    got = stats(learn, method, num_it=64)
    assert not capsys.readouterr().out and disk(tmp_path)==before and (list(learn.opt.hypers) if learn.opt else None)==hypers
    if first=='search': assert_same(stats(learner(), method, num_it=64), got)
    learn.fit(4, 1e-2)
    assert done(learn)

@pytest.mark.parametrize('derived', [False,True])
@pytest.mark.parametrize('module', ['wandb','tensorboard'])
@each_method
def test_logging_services(module, derived, tmp_path, method):
    "Stand-ins for callbacks that report to a service: they take part in batches, but do not report a search"
    def report(self): (tmp_path/'log').open('a').write('.')
    events = dict.fromkeys(('before_fit','before_batch','after_pred','after_batch','after_epoch','after_fit'), report)
    cls = type('Logger', (Callback,), events | dict(__module__=f'fastai.callback.{module}'))
    if derived: cls = type('Mine', (cls,), dict(__module__='mine'))
    learn = learner(path=tmp_path, cbs=cls())
    got = stats(learn, method)
    assert not list(tmp_path.iterdir())
    assert_same(stats(learner(), method), got)
    with learn.no_logging(): learn.fit(1, 1e-12)
    assert (tmp_path/'log').stat().st_size==1+16*3+2*3+1+1

@each_method
def test_real_logging_services(tmp_path, method):
    "And the true one, where it is installed"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = learner(path=tmp_path, cbs=TensorBoardCallback(tmp_path/'runs', trace_model=False, log_preds=False))
    stats(learn, method)
    assert not (tmp_path/'runs').exists()
    with learn.no_logging(): learn.fit(1, 1e-12)
    assert list((tmp_path/'runs').iterdir())

# --- a learner that accumulates gradients already

def accumulating(n_acc=32, bs=8, **kwargs): return learner(bs=bs, cbs=GradientAccumulation(n_acc), **kwargs)

def test_accumulated_batch_is_the_current_one():
    "The optimizer steps with 32 items, and the learning rate is meant for that"
    learn = accumulating()
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    table = learn.recorder.bs_table()
    now = table.loc[32]
    assert learn.recorder.train_bs==32 and now.steps==now.examples==1 and np.isclose(now.lr, 1e-3)
    assert not np.isclose(table.lr[8], 1e-3)

@pytest.mark.parametrize('row', [4,8,16,32,64])
def test_how_trains_with_as_many_items_as_its_row_says(row):
    learn = accumulating()
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    exec(learn.recorder.bs_table().how[row], globals(), dict(learn=learn))
    seen = []
    class Count(Callback):
        order,n,run_valid = 1000,0,False
        def after_loss(self): self.n += len(self.yb[0])
        def before_step(self): seen.append(self.n)
    with learn.no_logging(): learn.fit(2, 1e-3, cbs=Count())
    assert np.diff(seen).tolist()==[row]*(len(seen)-1) and len(seen)==256//row

@pytest.mark.parametrize('n_acc', [None, 8, 16])
@pytest.mark.parametrize('row', [4,8,16])
def test_how_also_where_nothing_is_accumulated_now(n_acc, row):
    "A loader of 16 with an accumulation of 16, which smaller batches would wake up"
    learn = learner(bs=16, cbs=GradientAccumulation(n_acc) if n_acc else [])
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    exec(learn.recorder.bs_table().how[row], globals(), dict(learn=learn))
    steps = []
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=Callback(after_step=lambda self: steps.append(1)))
    assert len(steps)==128//row

class MyAccumulator(Callback):
    "Of another package"
    def __init__(self, n_acc=None):
        if n_acc: self.n_acc = n_acc
    def before_batch(self): self.learn.xb = self.xb

def test_an_accumulator_of_another_kind():
    "Its number is believed, and the lines take it away; without a number it is said what is assumed"
    learn = learner(cbs=MyAccumulator(32))
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    assert learn.recorder.train_bs==32
    exec(learn.recorder.bs_table().how[64], globals(), dict(learn=learn))
    assert not learn._grab_cbs(MyAccumulator) and len(learn._grab_cbs(GradientAccumulation))==1
    with pytest.warns(UserWarning, match="MyAccumulator accumulates gradients, and has no number `n_acc`.*loader's batch of 8"):
        learner(cbs=MyAccumulator()).bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)

# --- callbacks that do what a search has no answer to

def test_a_rate_that_a_callback_sets():
    "What was asked for is not what the optimizer used: it is said, and the table starts from what was"
    class Warmup(Callback):
        def before_batch(self): self.opt.set_hyper('lr', .01*(1+self.train_iter))
    learn = learner(cbs=Warmup())
    with pytest.warns(UserWarning, match='A callback changed the learning rate: asked for was 0.001, used were 0.05 to 0.4'):
        learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    assert np.isclose(learn.recorder.bs_table().lr[8], .4)

def test_a_rate_that_is_put_back():
    "Seen is what the optimizer steps with"
    class Burst(Callback):
        order = 1000
        def before_step(self): self.opt.set_hyper('lr', .5)
        def after_step(self): self.opt.set_hyper('lr', 1e-3)
    with pytest.warns(UserWarning, match='asked for was 0.001, used were 0.5 to 0.5'):
        learner(cbs=Burst()).bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)

def test_a_second_optimizer():
    "Of a learner's own: what it trains is not measured, and it is said"
    learn = learner()
    learn.critics = [SGD([nn.Parameter(torch.ones(3))], lr=.1)]
    with pytest.warns(UserWarning, match=r'further optimizers \(critics\).*no batch size follows from it'):
        learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)

def test_mixed_precision_is_no_second_optimizer():
    "Though it pretends to be one"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'the learner has further optimizers')
        learner().to_bf16().bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)

@pytest.mark.parametrize('call', [lambda o: o.bs_find(1e-3, num_it=40, show_plot=False), lambda o: o.bs_profile()])
def test_what_to_do_where_a_callback_cannot_do_with_a_mock_training(call):
    class Mean(Callback):
        def before_batch(self): self.learn.xb = self.xb
        def after_validate(self): self.acc = 1/len(self.recorder.values)
    with pytest.raises(Exception, match='Exception occured in `Mean`(.|\n)*set `Mean.run_mock = False`'): call(learner(cbs=Mean()))

def test_a_schedule_by_the_number_of_the_batch(learn):
    "A value for each iteration of an epoch, as many as a training has"
    class Table(Callback):
        def before_fit(self): self.values = torch.linspace(0, 1, self.n_epoch*len(self.dls.train)).tolist()
        def before_batch(self):
            self.opt.set_hyper('wd', self.values[self.train_iter if self.training else 0])
            assert self.pct_train < 1 and self.iter < len(self.dls.train)
    learn.add_cb(Table())
    assert learn.bs_profile(bss=[64,256], show_plot=False).fits.all()
    assert learn.bs_find(1e-3, num_it=40, show_plot=False).critical

def test_a_gan_is_refused():
    gen = basic_generator(8, 1, in_sz=4, n_features=8)
    crit = basic_critic(8, 1, n_features=8)
    dls = learner().dls
    gan = GANLearner.wgan(dls, gen, crit)
    with pytest.raises(ValueError, match='a GAN trains two models in turns'): gan.bs_find(1e-3, num_it=40, show_plot=False)

def test_losses_that_take_turns():
    class Turns(Callback):
        def before_batch(self): self.learn.loss_func = losses[self.train_iter%2]
    losses = [CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat()]
    with pytest.warns(UserWarning, match='no batch size follows from it'):
        learner(cbs=Turns()).bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)

def test_accumulation_of_another_package():
    "It is named, and not confused with our method of that name"
    class MyGradientAccumulator(Callback):
        def before_step(self): pass
    learn = learner(cbs=MyGradientAccumulator())
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    with pytest.raises(ValueError, match='MyGradientAccumulator and BSFinder both decide when the optimizer steps'):
        learn.fit(1, 1e-3, cbs=BSFinder())

# --- validation, targets and gradients that come from elsewhere

@pytest.mark.parametrize('order', [-100, 0, 60, 1000])
def test_pairs_around_the_validation(order):
    "Averaged weights are swapped in before it and out after it: either both or neither"
    events = []
    class Averages(Callback):
        def before_train(self): self.model.train() # takes part
        def after_step(self): self.learn.pct_train = self.pct_train
        def before_validate(self): events.append('before')
        def after_validate(self): events.append('after')
    cb = Averages()
    cb.order = order
    got = stats(learner(cbs=cb), num_it=64)
    assert_same(stats(learner(), num_it=64), got)
    learner(cbs=cb).bs_profile(show_plot=False, max_bs=16)
    assert events[::2]==['before']*len(events[::2]) and events[1::2]==['after']*len(events[::2])

@pytest.mark.parametrize('order', [-60, 0, 20, 60, 100])
def test_a_target_that_a_callback_sets(order):
    "Self-supervised learning: the batches have none of their own"
    class Target(Callback):
        def before_batch(self): self.learn.yb = (self.xb[0][:,0].argmax(-1)[:,0]*0+self.xb[0].sum((1,2,3)).long()%10,)
    cb = Target()
    cb.order = order
    items = [(x,) for x,_ in digits()[:128]]
    learn = learner(items=items, cbs=cb)
    with_target = [(x, tensor(int(x.sum())%10)) for x, in items]
    assert_same(stats(learner(items=with_target)), stats(learn))
    assert len(learn.bs_profile(show_plot=False, max_bs=16))==2

def test_no_target_at_all():
    learn = learner(items=[(x,) for x,_ in digits()[:128]], loss=lambda pred, *yb: pred.mean())
    for f in (lambda: learn.bs_find(1e-3, num_it=40, show_plot=False), lambda: learn.bs_profile()):
        with pytest.raises(ValueError, match='have no target'): f()

def test_without_gradients():
    "Under `no_grad`, as where a callback of a validation calls, they are computed all the same; inference mode is refused"
    want = stats(learner())
    with torch.no_grad():
        assert_same(want, stats(learner()))
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        for f in (lambda o: o.bs_find(1e-3, num_it=40), lambda o: o.bs_profile()):
            with pytest.raises(RuntimeError, match="inference mode: call this outside of `torch.inference_mode"): f(learner())

# --- which callbacks take part

class Reports(Callback):
    "A tracker from a package of its own: rates in `before_batch`, losses in `after_batch`"
    def __init__(self, log): self.log = log
    def before_fit(self): self.log.append(self.opt.hypers[-1]['lr'])
    def before_batch(self): self.log.append((len(self.yb[0]), self.opt.hypers[-1]['lr']))
    def after_batch(self): self.log.append(self.loss.item())
    def after_fit(self): self.log.append('end')

class Doubles(Callback):
    def before_batch(self): self.learn.xb = tuple(2*o for o in self.xb)

@pytest.fixture
def from_a_package(monkeypatch):
    "Make a class look as if it came from an installed package"
    def _f(cls):
        module = types.ModuleType('some_tracker')
        module.__file__ = sysconfig.get_path('purelib')+'/some_tracker/__init__.py'
        monkeypatch.setitem(sys.modules, 'some_tracker', module)
        monkeypatch.setattr(cls, '__module__', 'some_tracker')
        return cls
    return _f

def test_a_tracker_of_another_package_writes_nothing(from_a_package):
    run = []
    learn = learner(cbs=from_a_package(Reports)(run))
    got = stats(learn)
    learn.bs_profile(show_plot=False, max_bs=16)
    assert run==[]
    assert_same(stats(learner()), got)
    with learn.no_logging(): learn.fit(1, 1e-12)
    assert len(run)==2+2*16+2*2

def test_what_changes_the_training_takes_part(from_a_package):
    "From wherever it comes"
    cls = from_a_package(Doubles)
    assert takes_part(cls()) and not takes_part(from_a_package(Reports)([]))
    assert_far(measure(learner(cbs=cls())), measure(learner()))

@pytest.mark.parametrize('said', [True,False])
def test_a_callback_can_say_so_itself(said):
    class Mine(Doubles): run_mock = said
    assert takes_part(Mine())==said

def test_a_mock_training_is_marked():
    "Many callbacks stand down where the learner has `lr_finder`"
    seen = []
    class Polite(Callback):
        def before_batch(self):
            seen.append(hasattr(self.learn, 'lr_finder'))
            self.learn.xb = self.xb
    learn = learner(cbs=Polite())
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None), learn.bs_profile(show_plot=False, max_bs=16)
    assert all(seen) and not hasattr(learn, 'lr_finder')
    seen.clear()
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert not any(seen)
