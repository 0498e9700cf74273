"Studies: what a run records, what happens to long work, and whether the fits are right."
import math, os, signal, subprocess, sys, time
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import SGD
from fastai_bs_finder.all import bs_study, Study
from fastai_bs_finder.stats import fit_steps, regimes
from fastai_bs_finder.study import larger_is_better, Plan, RunLog, ToTarget, run
from helpers import loaders, plain_learner
from torch import nn

def get_learner(bs, **kwargs): return plain_learner(bs, 512, opt_func=SGD, metrics=[accuracy,error_rate], **kwargs)

def study(get_learner=get_learner, bss=(16,64), lrs=(.05,.1), **kwargs):
    return bs_study(get_learner, list(bss), lrs, **(dict(target=1., n_seeds=2, max_examples=20_000, progress=False) | kwargs))

same_in = ['bs','lr','seed','end','steps','examples','train_loss','valid_loss','best_valid_loss','accuracy']

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
        def before_validate(self): time.sleep(.3)
    for plan in (Plan(epochs=3), Plan(target=.01, max_examples=640)):
        assert run(partial(get_learner, cbs=Slow()), plan, 64, .05)['seconds'] < .5

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
        return get_learner(bs, cbs=Count())
    for bs in (16,256): run(counted, Plan(epochs=1), bs, .1)
    assert set(seen)=={len(loaders().valid_ds)}

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

def test_nothing_reached():
    with pytest.warns(UserWarning, match='none of the 4 runs reached valid_loss 0.001; the best was .* at batch size'):
        res = study(lrs=[.1], target=1e-3, max_examples=640)
    for f in (res.best, res.critical, res.plot_steps, res.plot_time): # each says the same
        with pytest.raises(ValueError, match='none of the 4 runs reached'): f()

# --- long work

def test_it_goes_on_where_it_stopped(tmp_path):
    "Nothing that is finished is repeated, and the table is the same"
    whole,made = study(),[]
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

program = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_study import *
study(path=sys.argv[2])
'''

@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    "SIGKILL, which nobody can catch: the table on disk is whole, and at the end the same as that of a study in one piece"
    rng,here = np.random.default_rng(0),os.path.dirname(__file__)
    command = [sys.executable, '-W', 'ignore', '-c', program, here, str(tmp_path)]
    rows = []
    for _ in range(60):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(6, 14))
            break
        except subprocess.TimeoutExpired: process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path/'runs.csv').exists(): rows.append(len(pd.read_csv(tmp_path/'runs.csv')))
    assert process.returncode==0 and rows==sorted(rows)
    kept = Study.load(tmp_path)
    assert_alike(kept, study())
    assert not kept.df.duplicated(['bs','lr','seed']).any()

def test_processes_make_the_same_table():
    "Steps and losses; seconds are marked"
    one,two = study(),study(n_jobs=2)
    assert_alike(one, two)
    assert one.df.alone.all() and not two.df.alone.any()

def test_other_settings_are_refused(tmp_path):
    study(path=tmp_path)
    assert study(path=tmp_path).df.steps.max() > 0
    with pytest.raises(ValueError, match=r'holds a study with target=1.0, which is not what was asked for'): study(path=tmp_path, target=.9)

def test_what_was_given_up_is_made_again_where_more_is_allowed(tmp_path):
    "As in a grid in the folder of a tuned study, in which a learning rate could not win any more"
    whole = study(path=tmp_path)
    df = pd.read_csv(tmp_path/'runs.csv', float_precision='round_trip')
    df.loc[2, ['end','reached','most','steps']] = 'given up',False,10.,12
    df.to_csv(tmp_path/'runs.csv', index=False)
    assert Study.load(tmp_path).df.end[2]=='given up'
    assert_alike(study(path=tmp_path), whole)

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

@pytest.mark.parametrize('rule,lrs', [('constant',(.1,.1)), ('linear',(.1,.4)), ('sqrt',(.1,.2)), ('noise',(.1,.1*4*(16+48)/(64+48)))])
def test_rates_by_a_rule(rule, lrs):
    res = study(lrs=rule, lr=.1, noise_scale=48, n_seeds=1, max_examples=64)
    assert np.allclose(res.df.lr, lrs)

# --- refused before hours are spent

@pytest.mark.parametrize('kwargs,words', [
    (dict(target=None), 'say how long to train'), (dict(bss=[]), 'bss must be whole numbers'), (dict(bss=[16.5]), 'bss must be'),
    (dict(lrs='best'), "lrs must be learning rates, 'tuned', or one of"), (dict(lrs='tuned'), 'starts from a learning rate'),
    (dict(n_seeds=0), 'n_seeds must be a whole number'), (dict(target='low'), 'target must be a number'),
    (dict(metric='f1'), "there is no 'f1' to judge by, only 'valid_loss', 'accuracy'"), (dict(bss=[1024]), 'more than the 512 items'),
    (dict(bss=[24], micro_bs=16), "can't be made of micro-batches of 16"), (dict(lrs=[-.1]), 'lr must be positive'),
    (dict(target=3.), 'is reached already'), (dict(fit=Learner.fit_one_cycle), 'a schedule needs to know its length'), (dict(lrs='noise', lr=.1), 'needs noise_scale')])
def test_bad_input(kwargs, words):
    made = []
    def counted(bs): made.append(bs); return get_learner(bs)
    with pytest.raises(ValueError, match=words):
        bs_study(counted, **(dict(bss=[16,64], lrs=[.1], target=1., progress=False) | kwargs))
    assert len(made) <= 3

def test_learners_that_are_no_good():
    one = get_learner(16)
    with pytest.raises(ValueError, match='the same learner, or the same model, twice'): study(lambda bs: one, [16])
    with pytest.raises(ValueError, match='training batches have 16 items: let it hand the number on'):
        study(lambda bs: get_learner(16))

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

def test_regimes_that_are_missing():
    assert regimes([8,16,32], [100,50,25])==((8,32),None,None)
    assert regimes([8,16,32], [100,99,98])==(None,None,(8,32))

# --- pictures

def test_pictures(tmp_path):
    res = study(lrs=[.05,.1,.2], n_seeds=1, dynamics=True)
    for f in (partial(res.plot_steps, critical=50), res.plot_time, res.plot_lr, res.plot_generalisation, res.plot_dynamics):
        fig = f(return_fig=True)
        fig.savefig(tmp_path/'x.png')
        assert all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes)
    with pytest.raises(ValueError, match='no dynamics'): study(n_seeds=1).plot_dynamics()

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
