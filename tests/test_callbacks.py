"Callbacks and optimizers beside a search: they change no measurement, and work on afterwards."
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Adam, Lamb, RMSProp, SGD
from helpers import disk
from measuring import (
    assert_close, assert_same, drowned_is_fine, each_method, exact, Grads, learner, measure, stats, torch_opt)

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

@pytest.mark.parametrize('first', ['search','fit'])
@pytest.mark.parametrize('nm', trackers)
@each_method
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
