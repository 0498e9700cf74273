"Studies: what a run records, what happens to long work, and whether the fits are right."
import math, os, shutil, signal, time
from functools import partial
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import Lamb, Larc, OptimWrapper, SGD
from fastai_bs_finder.all import bs_study, Study
from fastai_bs_finder.stats import fit_steps, regimes
from fastai_bs_finder.study import _batches, _Engine, larger_is_better, Plan, RunLog, ToTarget, run, sharpness
from helpers import forks, loaders, plain_learner
from torch import nn

def get_learner(bs, val_bs=360, **kwargs):
    "Validates in a single batch, since a study looks often"
    learn = plain_learner(bs, 512, **dict(opt_func=SGD, metrics=[accuracy,error_rate]) | kwargs)
    learn.dls.loaders[1] = learn.dls.valid.with_bs(val_bs)
    return learn

def study(get_learner=get_learner, bss=(16,64), lrs=(.05,.1), **kwargs):
    return bs_study(get_learner, list(bss), lrs, **(dict(target=1., n_seeds=2, max_examples=20_000, progress=False) | kwargs))

same_in = ['bs','lr','seed','end','steps','examples','train_loss','valid_loss','best_valid_loss','accuracy']

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A study in one piece, in a folder of its own"
    return study(path=tmp_path_factory.mktemp('whole'))

@pytest.fixture
def finished(whole, tmp_path):
    "A folder that has all of it"
    return shutil.copytree(whole.path, tmp_path/'finished')

def assert_alike(a, b): pd.testing.assert_frame_equal(a.df[same_in], b.df[same_in])

# --- what a run records

@pytest.mark.parametrize('micro_bs', [None,16])
def test_steps_and_examples(micro_bs):
    "512 items in batches of 64 are 8 steps an epoch, also where gradients are accumulated"
    row = run(get_learner, Plan(epochs=3, micro_bs=micro_bs), 64, .05)
    assert (row['steps'],row['examples'],row['end'])==(24,1536,'ended')
    assert math.isclose(row['items_per_second'], 1536/row['seconds']) and math.isclose(row['step_time'], row['seconds']/24)

def test_the_clock_stands_still_while_it_validates():
    class Slow(Callback):
        def __init__(self, seconds): self.seconds,self.slept = seconds,0.
        def before_validate(self): time.sleep(self.seconds); self.slept += self.seconds
    for seconds,plan in ((.3,Plan(epochs=3)), (.1,Plan(target=.01, max_examples=640))):
        slow = Slow(seconds)
        assert run(partial(get_learner, cbs=slow), plan, 64, .05)['seconds'] < .5 < slow.slept

def test_what_a_plain_training_gives():
    "A course is a training as one makes it, whatever is recorded"
    def fit(learn, epochs, lr): learn.fit_one_cycle(epochs, lr)
    learn = get_learner(64)
    rows = [run(get_learner, Plan(epochs=2, fit=f), 64, .1, seed=3) for f in (None,fit)]
    assert rows[0]['valid_loss']==rows[1]['valid_loss']
    rng = run(get_learner, Plan(epochs=2), 64, .1, seed=4)
    assert rng['valid_loss']!=rows[0]['valid_loss']

def test_looking_changes_nothing():
    "Validations between two batches leave the training as it was"
    def losses(*cbs):
        learn,seen = get_learner(64),[]
        with learn.no_logging(): learn.fit(2, .1, cbs=[*cbs, Callback(after_step=lambda self: seen.append(float(self.learn.loss)))])
        return seen
    log = RunLog()
    assert losses()==losses(log, ToTarget(log, 0.)) and len(log.history) > 5

@pytest.mark.parametrize('metric,target', [('accuracy',.6), ('error_rate',.4)])
def test_targets_for_metrics(metric, target):
    "An accuracy is to rise, an error to fall; the mean of the last three counts"
    row = run(get_learner, Plan(target=target, metric=metric, max_examples=50_000), 16, .1)
    assert row['end']=='reached' and (row['best_accuracy'] >= .6) and row['best_error_rate'] <= .4

def test_all_items_are_judged_by():
    "Also where the loader drops what is no whole batch"
    seen = []
    def counted(bs):
        class Count(Callback):
            def before_fit(self): self.n = 0
            def before_validate(self): self.n = 0
            def after_batch(self): self.n += 0 if self.training else len(self.yb[0])
            def after_validate(self): seen.append(self.n)
        return get_learner(bs, val_bs=bs, cbs=Count())
    for bs in (16,256): run(counted, Plan(target=0., max_examples=512), bs, .1)
    assert set(seen)-{0}=={len(loaders().valid_ds)} # none where it was no time to look

def test_a_schedule_of_several_fits():
    "As `fine_tune`, which fits twice: all of it counts"
    def twice(learn, epochs, lr): learn.fit(1, lr), learn.fit(epochs, lr/2)
    row = run(get_learner, Plan(epochs=2, fit=twice, dynamics=True), 64, .1)
    assert (row['steps'],row['end'])==(24,'ended') and row['distance'] > 0
    row = run(get_learner, Plan(target=2., epochs=60, fit=twice), 64, .1)
    assert row['end']=='reached' and 8 < row['steps'] < 8*61

@pytest.mark.parametrize('name,larger', [('accuracy',True), ('_rmse',False), ('mae',False), ('error_rate',False), ('R2Score',True)])
def test_which_way_is_better(name, larger): assert larger_is_better(name)==larger

def test_warm_up():
    lrs = []
    def watched(bs): return get_learner(bs, cbs=Callback(after_step=lambda self: lrs.append(self.learn.opt.hypers[-1]['lr'])))
    run(watched, Plan(target=0., max_examples=640, warmup=4), 64, .1)
    assert np.allclose(lrs[:6], [.025,.05,.075,.1,.1,.1])

@pytest.mark.parametrize('opt_func', [Larc, Lamb, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_any_optimizer(opt_func):
    "fastai's and PyTorch's"
    plans = Plan(epochs=2, dynamics=True),Plan(target=1.5, max_examples=20_000)
    ends = [run(partial(get_learner, opt_func=opt_func), o, 16, .01)['end'] for o in plans]
    assert ends==['ended','reached']

def test_mixed_precision_with_a_schedule_to_a_target():
    "Which is not reached before the schedule ends"
    from fastai.callback.fp16 import MixedPrecision
    plan = Plan(target=.01, epochs=2, fit=Learner.fit_one_cycle)
    row = run(lambda bs: get_learner(bs, cbs=MixedPrecision(amp_mode='bf16')), plan, 64, .05)
    assert (row['end'],row['steps'])==('given up',16)

# --- whatever happens, it is a row

class Fails(Callback):
    def __init__(self, error): self.error = error
    def after_loss(self):
        if self.training and self.train_iter==3: raise self.error

@pytest.mark.parametrize('error,end', [
    (ValueError('mine'), 'ValueError: .*mine'), (torch.cuda.OutOfMemoryError('CUDA out of memory'), 'out of memory')])
def test_an_error_is_a_row(error, end):
    with pytest.warns(UserWarning, match='none of the 2 runs'):
        res = bs_study(lambda bs: get_learner(bs, cbs=Fails(error)), [16,64], [.1], target=.5, n_seeds=1, progress=False)
    assert res.df.end.str.match(end).all() and (res.df.steps==3).all() and not res.df.reached.any()

@pytest.mark.parametrize('plan', [Plan(epochs=1), Plan(target=.5, max_examples=10_000)])
def test_divergence_is_a_row(plan): assert run(get_learner, plan, 64, 1e6)['diverged']

def test_a_minority_of_seeds(tmp_path):
    "One of three reaches the target: nothing is lost, and what is said is true"
    made = []
    def sometimes(bs): made.append(bs); return get_learner(bs, cbs=Fails(ValueError()) if len(made) > 3 else ())
    with pytest.warns(UserWarning, match='only 1 of the 3 runs reached valid_loss 1'): res = study(sometimes, [64], [.1], n_seeds=3)
    assert list(res.df.reached)==[True,False,False]

def test_no_number_is_a_divergence():
    "Also where a callback ends the training before any validation"
    from fastai.callback.tracker import TerminateOnNaNCallback
    row = run(lambda bs: get_learner(bs, cbs=TerminateOnNaNCallback()), Plan(epochs=1), 64, 1e30)
    assert row['diverged'] and not row['reached'] and row['end']=='diverged'

def test_a_target_that_is_never_reached_comes_to_an_end():
    with pytest.warns(UserWarning, match='none of the 1 runs reached'): res = study(bss=[256], lrs=[1e-9], n_seeds=1, max_examples=None)
    assert res.df.end[0]=='given up' and 51_200 <= res.df.examples[0] < 55_000

def test_frozen_layers():
    "All groups are followed, as they are; what is frozen has moved by 0"
    from fastai.torch_core import params
    def frozen(bs):
        learn = get_learner(bs, splitter=lambda m: [params(m[0]),params(m[4])])
        learn.freeze()
        return learn
    def thaws(learn, epochs, lr): learn.fit(1, lr), learn.unfreeze(), learn.fit(epochs, lr)
    row = run(frozen, Plan(epochs=1, fit=Learner.fit, dynamics=True), 64, .1)
    assert row['distance_0']==0 < row['distance_1'] and math.isclose(row['distance'], row['distance_1'], rel_tol=1e-5)
    assert run(frozen, Plan(epochs=1, fit=thaws, dynamics=True), 64, .1)['distance_0'] > 0

def test_callbacks_that_write(tmp_path):
    "Files of the user's stay as they are; what is recorded belongs to the weights that are left"
    from fastai.callback.tracker import SaveModelCallback
    def saves(bs): return get_learner(bs, path=tmp_path, cbs=SaveModelCallback(monitor='accuracy'))
    seen = []
    def fit(learn, epochs, lr):
        learn.fit(epochs, lr)
        with learn.removed_cbs(learn.cbs[-2:]), learn.no_logging(): seen.append(learn.validate()[0])
    row = run(saves, Plan(epochs=3, fit=fit), 64, .3)
    assert row['end']=='ended' and math.isclose(row['valid_loss'], seen[0], rel_tol=1e-5) and math.isfinite(row['train_loss'])
    assert not list(tmp_path.iterdir())

def test_other_callbacks():
    "Those that fetch predictions in a validation, and those that draw"
    from fastai.callback.core import FetchPredsCallback
    from fastai.callback.progress import ShowGraphCallback
    for plan in (Plan(epochs=1), Plan(target=0., max_examples=640)):
        for cb in (FetchPredsCallback, ShowGraphCallback):
            row = run(lambda bs: get_learner(bs, cbs=cb()), plan, 64, .1)
            assert row['end'] in ('ended','given up'), row['end']

def test_a_metric_that_is_no_number():
    def each(pred, y): return torch.ones(3)
    row = run(lambda bs: plain_learner(bs, 512, opt_func=SGD, metrics=[each,accuracy]), Plan(epochs=1), 64, .1)
    assert row['end']=='ended' and 'each' not in row and 0 < row['accuracy'] < 1

def test_which_way_is_better_can_be_said():
    def wer(pred, y): return (pred.argmax(1)!=y).float().mean()
    learner = partial(get_learner, metrics=wer)
    kw = dict(metric='wer', target=.4, max_examples=50_000)
    with pytest.raises(ValueError, match='is reached already'): study(learner, **kw)
    res = study(learner, rises=False, bss=[16], **kw)
    assert res.df.reached.all() and (res.df.best_wer <= .4).all()

def test_what_is_no_divergence():
    "A high loss on the validation set alone: batch norm does not know its means yet, or the model has learnt by heart"
    class High(Callback):
        def after_loss(self):
            if not self.training: self.learn.loss_grad = self.learn.loss = 100+self.learn.loss
    for plan in (Plan(epochs=2), Plan(target=.1, max_examples=1000)):
        row = run(partial(get_learner, cbs=High()), plan, 64, .05)
        assert row['valid_loss'] > 100 and row['end'] in ('ended','given up')

def test_the_training_loss_of_a_course():
    "Over the whole training set, with the weights of the end and without dropout: the same at all batch sizes"
    def dropped(bs):
        learn = get_learner(bs)
        learn.model.insert(4, nn.Dropout(.5))
        return learn
    losses = [run(dropped, Plan(epochs=1), bs, 1e-12)['train_loss'] for bs in (16,64,256)]
    x,y = (torch.stack([torch.as_tensor(o) for o in os]) for os in zip(*loaders(512).train_ds))
    with torch.no_grad(): by_hand = nn.functional.cross_entropy(get_learner(16).model(x), y)
    assert np.allclose(losses, float(by_hand), rtol=1e-4)

def test_callbacks_that_want_a_validation_each_epoch(tmp_path):
    "They have none in a training to a target, and stay out of it"
    from fastai.callback.tracker import EarlyStoppingCallback
    row = run(lambda bs: get_learner(bs, cbs=EarlyStoppingCallback(patience=1)), Plan(target=1.), 64, .1)
    assert row['end']=='reached'

def test_a_schedule_that_ends_between_two_looks():
    row = run(get_learner, Plan(target=0., epochs=4), 64, .05) # 32 steps; it would look at 30 and 33
    log = RunLog()
    learn = get_learner(64)
    with learn.no_logging(): learn.fit(4, .05, cbs=[log, ToTarget(log, 0.)])
    assert log.history[-1]['step']==log.steps==row['steps']==32

def test_nothing_reached():
    with pytest.warns(UserWarning, match='none of the 4 runs reached valid_loss 0.001 .* the best single one was .* at batch size'):
        res = study(lrs=[.1], target=1e-3, max_examples=640)
    for f in (res.best, res.critical, res.plot_steps, res.plot_time): # each says the same
        with pytest.raises(ValueError, match='none of the 4 runs reached'): f()

# --- long work

def test_it_goes_on_where_it_stopped(tmp_path, whole):
    "Nothing that is finished is repeated, and the table is the same"
    made = []
    def counted(bs): made.append(bs); return get_learner(bs)
    class Enough(Exception): pass
    def stops(bs):
        if len(made) >= 6: raise KeyboardInterrupt
        return counted(bs)
    with pytest.raises(KeyboardInterrupt): study(stops, path=tmp_path)
    n = len(Study.load(tmp_path).df)
    assert 0 < n < len(whole.df)
    made.clear()
    assert_alike(study(counted, path=tmp_path), whole)
    assert len(made)==3+len(whole.df)-n # three to look at, and the rest of the runs
    assert_alike(Study.load(tmp_path), whole)

def study_in(path):
    "In a process that has not seen `conftest.py`"
    torch.set_num_threads(1)
    study(path=path)

@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, whole):
    "SIGKILL, which nobody can catch: the table on disk is whole, and at the end the same as that of a study in one piece"
    rng,rows,seconds = np.random.default_rng(0),[],{}
    for i in range(60):
        process = forks.Process(target=study_in, args=(tmp_path,))
        process.start()
        process.join(rng.uniform(.3, 1.5+i/2))
        if not process.is_alive(): break
        process.kill()
        process.join()
        kept = Study.load(tmp_path).rows if (tmp_path/'study.json').exists() else ()
        for o in kept: seconds.setdefault((o['bs'],o['lr'],o['seed']), o['seconds'])
        rows.append(len(seconds))
    assert process.exitcode==0 and rows and rows==sorted(rows)
    kept = Study.load(tmp_path)
    assert all(kept.find(*k)['seconds']==v for k,v in seconds.items()) # a run that is made again takes another time
    assert_alike(kept, whole)
    assert not kept.df.duplicated(['bs','lr','seed']).any()

def test_processes_make_the_same_table(whole):
    "Steps and losses; seconds are marked"
    two = study(n_jobs=2)
    assert_alike(whole, two)
    assert whole.df.alone.all() and not two.df.alone.any()

def test_other_settings_are_refused(finished):
    assert study(path=finished).df.steps.max() > 0
    with pytest.raises(ValueError, match=r'holds a study with target=1.0, which is not what was asked for'):
        study(path=finished, target=.9)

def test_what_was_given_up_is_made_again_where_more_is_allowed(finished, whole):
    "As in a grid in the folder of a tuned study, in which a learning rate could not win any more"
    df = Study.load(finished).df
    df.loc[2, ['end','reached','most','steps']] = 'given up',False,10.,12
    df.to_csv(finished/'runs.csv', index=False)
    assert Study.load(finished).df.end[2]=='given up'
    assert_alike(study(path=finished), whole)

def test_two_at_a_time_in_one_folder(tmp_path):
    "Rows that another process has written meanwhile stay"
    one,other = (Study(path=tmp_path, plan=Plan(target=1.)) for _ in range(2))
    for o in (one,other): o.resume()
    for i,o in enumerate((one,other,one)): o.add(dict(bs=16, lr=.1, seed=i, end='reached', steps=7))
    assert list(Study.load(tmp_path).df.seed)==list(one.df.seed)==[0,1,2]
    assert sorted(o.name for o in tmp_path.iterdir())==['runs.csv','study.json']

def test_a_folder_without_a_run(tmp_path):
    Study(path=tmp_path, plan=Plan(target=1.)).resume()
    assert str(Study.load(tmp_path))=='Study without a run' and Study.load(tmp_path).plan.target==1
    with pytest.raises(ValueError, match='no study.json, so it is not the folder'): Study.load(tmp_path/'other')

def course(learn, epochs, lr, div=25.): learn.fit_one_cycle(epochs, lr, div=div)

def test_schedules_are_told_apart(tmp_path):
    "Also functions whose options are filled in"
    def kept(fit): return bs_study(get_learner, [64], [.1], epochs=1, fit=fit, n_seeds=1, path=tmp_path, progress=False)
    kept(partial(course, div=10.))
    kept(partial(course, div=10.))
    for other in (partial(course, div=25.), course, None):
        with pytest.raises(ValueError, match=r"fit='course\(div=10.0\)'"): kept(other)

def test_a_learning_rate_on_which_one_can_rely():
    "One seed has failed: its survivors are faster, and the other rate is taken"
    rows = [dict(bs=16, lr=lr, seed=seed, end='', reached=steps < 999, steps=steps, steps_to_target=steps, seconds=1.)
            for lr,o in {.1: (150,150,150), .2: (100,110,999)}.items() for seed,steps in enumerate(o)]
    best = Study(pd.DataFrame(rows), Plan(target=1.)).best()
    assert (best.lr[16],best.steps_to_target[16])==(.1,150)
    assert Study(pd.DataFrame(rows[3:]), Plan(target=1.)).best().lr[16]==.2

@pytest.mark.parametrize('values,crossed', [
    ([9,6,6,6,3,3,3], 7), # means of 6 and 5 and 4, which belong to 4, 6 and 8: 4.5 is crossed halfway from 6 to 8
    ([9,1,1,1], 2), ([9,9,9,1,1], 5.375)])
def test_where_the_target_was_crossed(values, crossed):
    "The mean of three validations belongs to the middle one; between two a straight line"
    log = SimpleNamespace(history=[], steps=0, examples=0, seconds=0., diverged=False)
    end,why = ToTarget(log, 4.5),None
    for i,v in enumerate(values):
        if why: break
        log.history.append(dict(step=2*i, valid_loss=v))
        why = end._judge()
    assert (why,end.crossed)==('reached',crossed)

def killed(bs, parent):
    "One batch size is too much for the machine"
    if bs==256 and os.getpid()!=parent: os.kill(os.getpid(), signal.SIGKILL)
    return get_learner(bs)

def test_a_process_that_is_killed_is_a_row():
    "As the system does where memory runs out; the others go on"
    with pytest.warns(UserWarning, match='no learning rate has worked at batch size 256'):
        res = study(partial(killed, parent=os.getpid()), [256,64], [.1], n_seeds=1, n_jobs=2)
    assert dict(zip(res.df.bs, res.df.end))=={64: 'reached', 256: 'killed by the system'}

def test_callbacks_that_cancel_are_obeyed_in_other_processes():
    "Also those of a notebook, which are sent as they are written"
    class Once(Callback):
        def after_batch(self): raise CancelFitException
    res = study(lambda bs: get_learner(bs, cbs=Once()), [64], [.1], n_jobs=2, target=None, epochs=2)
    assert list(res.df.end)==['ended']*2 and list(res.df.steps)==[1,1]

def lost(): raise AttributeError("can't get attribute 'images'")

class Lost:
    "Can be sent to another process, but not received there; a cached function of a notebook is like that"
    def __reduce__(self): return lost,()

def test_what_another_process_cannot_read_is_told():
    with pytest.raises(ValueError, match=r"in pieces \(AttributeError: can't get attribute 'images'\).* or pass n_jobs=1"):
        study(partial(lambda bs, lost: get_learner(bs), lost=Lost()), n_jobs=2)

def test_another_learner_is_refused(tmp_path):
    study(path=tmp_path, lrs=[.1], n_seeds=1)
    with pytest.raises(ValueError, match="holds a study with learner='.* parameters, SGD, .*512 items'"):
        study(partial(plain_learner, n=512), path=tmp_path)

def test_errors_are_tried_again(tmp_path):
    "The reason may be mended; what is finished is not repeated"
    with pytest.warns(UserWarning, match='none of the 2 runs'):
        study(lambda bs: get_learner(bs, cbs=Fails(ValueError('mine'))), [64], [.1], path=tmp_path)
    assert_alike(study(bss=[64], lrs=[.1], path=tmp_path), study(bss=[64], lrs=[.1]))

def test_random_numbers_go_on_as_before():
    torch.manual_seed(3)
    one = torch.rand(2)
    torch.manual_seed(3)
    bs_study(get_learner, [64], [.1], epochs=1, n_seeds=1, progress=False)
    assert torch.equal(torch.rand(2), one)

def test_a_learner_that_cannot_be_built_is_a_row():
    made = []
    def breaks(bs):
        made.append(bs)
        if len(made) > 3: raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        return get_learner(bs)
    with pytest.warns(UserWarning, match='none of the 4 runs has worked: out of memory'): res = study(breaks, lrs=[.1])
    assert set(res.df.end)=={'out of memory'}

def test_tuned_rates():
    "In factors of two, up and down, until it gets worse; what can't win is given up"
    res = study(lrs='tuned', lr=.4, lr_bs=16, n_seeds=1)
    best,df = res.best(),res.df
    assert not best.edge.any() and set(np.log2(df.lr/.4).round(6)) <= set(range(-8,9))
    for bs,o in df.groupby('bs'): assert (o.steps <= 1.5*o[o.reached].steps.max()+20).all()

def test_the_tuner_and_the_table_agree():
    "A rate with which a seed has failed ends the climb: both sides of the best one are tried, and no edge is flagged"
    steps,study = {.05: (200,)*3, .1: (150,)*3, .2: (100,110,999), .4: (999,)*3},Study(plan=Plan(target=1.))
    engine = _Engine(study, None, range(3), 1, False)
    def rows(tasks):
        for bs,lr,seed,_ in tasks:
            o = steps[lr][seed]
            study.add(dict(bs=bs, lr=lr, seed=seed, end='', reached=o < 999, steps=o, steps_to_target=o, seconds=1.))
        return [study.find(*o[:3]) for o in tasks]
    engine.rows = rows
    assert engine.tune(16, .1)==.1 and study.best().lr[16]==.1 and not study.best().edge[16]

@pytest.mark.parametrize('rule,lrs', [('constant',(.1,.1)), ('linear',(.1,.4)), ('sqrt',(.1,.2)), ('noise',(.1,.1*4*(16+48)/(64+48)))])
def test_rates_by_a_rule(rule, lrs):
    res = study(lrs=rule, lr=.1, noise_scale=48, n_seeds=1, max_examples=64)
    assert np.allclose(res.df.lr, lrs)

# --- refused before hours are spent

@pytest.mark.parametrize('kwargs,words', [
    (dict(target=None), 'say how long to train'), (dict(bss=[]), 'bss must be whole numbers'), (dict(bss=[16.5]), 'bss must be'),
    (dict(lrs='best'), "lrs must be learning rates, 'tuned', or one of"), (dict(lrs='tuned'), 'starts from a learning rate'),
    (dict(lrs=[]), 'lrs has no learning rate'), (dict(n_seeds=0), 'n_seeds must be a whole number'), (dict(target='low'), 'target must be a number'),
    (dict(metric='f1'), "there is no 'f1' to judge by, only 'valid_loss', 'accuracy'"), (dict(bss=[1024]), 'more than the 512 items'),
    (dict(bss=[24], micro_bs=16), "can't be made of micro-batches of 16"), (dict(lrs=[-.1]), 'lr must be positive'),
    (dict(target=math.nan), 'target must be a number'), (dict(micro_bs=0), 'micro_bs must be a whole number'),
    (dict(lrs={16: [.1]}), r'for the batch sizes \[16\], and bss are \[16, 64\]'), (dict(lrs=[slice(.1,.2)]), 'one learning rate for all'),
    (dict(lrs='linear', lr=slice(.1,.2)), 'one learning rate for all'), (dict(warmup=-1), 'warmup must be a whole number'),
    (dict(max_examples=-1), 'max_examples must be positive'), (dict(n_jobs=0), 'n_jobs must be a whole number'),
    (dict(fit=lambda *args: None, epochs=1, path='x'), 'a lambda has no name'), (dict(target=3.), 'is reached already'), (dict(fit=Learner.fit_one_cycle), 'a schedule needs to know its length'), (dict(lrs='noise', lr=.1), 'needs noise_scale')])
def test_bad_input(kwargs, words):
    made = []
    def counted(bs): made.append(bs); return get_learner(bs)
    with pytest.raises(ValueError, match=words):
        bs_study(counted, **(dict(bss=[16,64], lrs=[.1], target=1., progress=False) | kwargs))
    assert len(made) <= 3

def test_learners_that_accumulate_by_themselves():
    from fastai.callback.training import GradientAccumulation
    with pytest.raises(ValueError, match='has GradientAccumulation, .* pass micro_bs='):
        study(lambda bs: get_learner(bs, cbs=GradientAccumulation(256)))

def test_a_loader_with_batches_of_a_sampler():
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler
    def sampled(bs):
        learn = get_learner(bs)
        ds = learn.dls.train_ds
        learn.dls = DataLoaders(DataLoader(ds, batch_sampler=BatchSampler(RandomSampler(ds), bs, drop_last=False)), learn.dls.valid)
        return learn
    assert study(sampled, [48,64], [.1], n_seeds=1).df.reached.all()

def test_learners_that_are_no_good():
    with pytest.raises(ValueError, match='must be a function that takes a batch size'): study(get_learner(16))
    one = get_learner(16)
    with pytest.raises(ValueError, match='the same learner, or the same model, twice'): study(lambda bs: one, [16])
    with pytest.raises(ValueError, match='training batches have 16 items: let it hand the number on'):
        study(lambda bs: get_learner(16))
    model = get_learner(16).model
    def shares(bs): # only at other sizes than the first
        learn = get_learner(bs)
        if bs==16: model.load_state_dict(learn.model.state_dict())
        if bs!=16 or not used: learn.model = model
        used.append(bs)
        return learn
    used = []
    with pytest.raises(ValueError, match='the same learner, or the same model, twice'): study(shares)

# --- the fits

class Noisy(nn.Module):
    "Half the squared length of the weights, where each item disturbs each coordinate's gradient by `sigma` times itself"
    def __init__(self, d): super().__init__(); self.w = nn.Parameter(torch.ones(d))
    def forward(self, x): return (self.w**2*(1+x)).mean(1)/2

def noisy(bs, sigma=8., d=100):
    "The noise scale is `sigma`², all along the way"
    items = [(o,0) for o in sigma*torch.randn(4096, d)]
    dls = DataLoaders.from_dsets(items, [(torch.zeros(d),0)]*8, bs=bs, num_workers=0, shuffle=True, drop_last=True, device='cpu')
    return Learner(dls, Noisy(d), lambda pred, y: pred.mean(), opt_func=SGD)

@pytest.mark.slow
def test_critical_batch_size_of_a_quadratic():
    "Known noise, a rate by the rule that belongs to it: the fit finds the noise scale of 64, to within a tenth"
    res = bs_study(noisy, [4,16,64,256,1024], 'noise', lr=.1*100/(1+64/1024), lr_bs=1024, noise_scale=64., target=.05, n_seeds=3, progress=False)
    fit = res.critical()
    assert abs(fit.critical/64-1) < .1 and fit.lower < 64*1.1 and fit.upper > 64*.9

def test_intervals_hold_what_they_promise():
    "200 studies of three trainings each"
    rng,sizes = np.random.default_rng(0),2**np.arange(3, 11)
    bs,hits = np.repeat(sizes, 3),0
    for _ in range(200):
        fit = fit_steps(bs, 300*(1+100/bs)*np.exp(.1*rng.standard_normal(len(bs))), n_boot=300)
        hits += fit.lower <= 100 <= fit.upper
    assert .9 <= hits/200 <= .995

def test_fits_where_there_is_no_critical_batch_size():
    sizes = 2**np.arange(3, 11)
    assert fit_steps(sizes, 1e6/sizes)[1:]==(math.inf,0.,math.inf)
    assert fit_steps(sizes, np.full(8, 100.)).critical==0
    with pytest.raises(ValueError, match='at least three batch sizes, got 8, 16'): fit_steps([8,16,16], [3,2,2])

def test_trainings_that_are_all_the_same_say_nothing_about_chance():
    fit = fit_steps(np.repeat([8,16,32,64], 2), np.repeat([100,60,50,90], 2))
    assert (fit.lower,fit.upper)==(0,math.inf)

def test_regimes_that_are_missing():
    assert regimes([8,16,32], [100,50,25])==((8,32),None,None)
    assert regimes([8,16,32], [100,99,98])==(None,None,(8,32))
    sizes = 2**np.arange(11)
    assert regimes(sizes, np.maximum(2**10/sizes, 2.))==((1,512),None,(512,1024)) # nine halvings, then none

# --- pictures

def drawn(f, tmp_path):
    "A picture whose axes have names and numbers"
    fig = f(return_fig=True)
    fig.savefig(tmp_path/'x.png')
    for ax in fig.axes:
        (low,high),ticks = ax.get_ylim(),ax.get_yticks()
        assert ax.get_xlabel() and ax.get_ylabel() and any(low <= o <= high for o in ticks)

def test_pictures(tmp_path, whole):
    res = study(lrs=[.1,.4], n_seeds=1, dynamics=True)
    for f in (partial(res.plot_steps, critical=50), res.plot_time, res.plot_lr, res.plot_dynamics): drawn(f, tmp_path)
    course = study(bss=[16], n_seeds=2, epochs=1, target=None)
    for f in (course.plot_time, course.plot_lr, course.plot_generalisation): drawn(f, tmp_path)
    for f,words in ((course.plot_steps,'train to a target'), (course.critical,'train to a target'), (res.plot_generalisation,'compare courses')):
        with pytest.raises(ValueError, match=words): f()
    with pytest.raises(ValueError, match='no dynamics'): whole.plot_dynamics()

def test_dynamics_of_a_known_way():
    "One parameter that goes straight: the distance is the sum of its steps, the gradient is 1, the angle 0"
    class Line(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
        def forward(self, x): return self.w+0*x.sum(1, keepdim=True)
    def line(bs):
        dls = DataLoaders.from_dsets([(torch.ones(2),0)]*256, [(torch.ones(2),0)]*8, bs=bs, num_workers=0, device='cpu')
        return Learner(dls, Line(), lambda pred, y: -pred.mean(), opt_func=SGD)
    row = run(line, Plan(epochs=4, fit=Learner.fit, dynamics=True), 16, .01)
    assert math.isclose(row['distance'], 64*.01, rel_tol=1e-4) and math.isclose(row['grad_norm'], 1) and row['grad_norm_std'] < 1e-6
    assert abs(row['update_angle']) < .1 and abs(row['hessian_max']) < 1e-6

def test_sharpness_of_a_language_model():
    "A model that returns a tuple and has a hidden state; the same items whatever the batch size, and the same value twice"
    from fastai.text.all import AWD_LSTM, LMDataLoader, awd_lstm_lm_config, language_model_learner
    texts = [torch.randint(0, 20, (400,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    def lm(bs):
        dls = DataLoaders(*(LMDataLoader(texts, bs=bs, seq_len=8, num_workers=0) for _ in range(2)))
        dls.vocab = [str(i) for i in range(20)]
        config = awd_lstm_lm_config | dict(emb_sz=8, n_hid=8, n_layers=1)
        return language_model_learner(dls, AWD_LSTM, config=config, pretrained=False)
    row = run(lm, Plan(epochs=1, dynamics=True), 4, .01)
    assert row['end']=='ended' and all(math.isfinite(row[k]) for k in ('hessian_max','sharpness','sharpness_100','distance'))

def test_sharpness_looks_at_the_same_items():
    "Whatever the batch size of the training, and without augmentation"
    learns = [get_learner(bs) for bs in (16,256)]
    a,b = ([torch.cat(o) for o in zip(*((x[0],y[0]) for x,y,_ in _batches(learn, 100)))] for learn in learns)
    assert len(a[0])==100 and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    with pytest.raises(ValueError, match='do not fit into'): sharpness(learns[0], n_dims=10**6)
