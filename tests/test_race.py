"Races of learning rates and batch sizes, and the recipe made of them."
import math, pickle, time
from copy import deepcopy

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastcore.foundation import L
from fastai_bs_finder.all import *
from fastai_bs_finder.lr import Race, Racer, Races, n_groups, top_lr
from fastai_bs_finder.profile import Profile
from fastai_bs_finder.recorder import BSRecorder, Search
from fastai_bs_finder.stats import ratio_interval
from fastai_bs_finder.suggest import epochs_at, in_epochs, lr_at, noise_scale_raced, raced
from helpers import digits, make_learner, plain_learner

def state_of(learn):
    "All of a learner that a race could disturb"
    opt = deepcopy(learn.opt.state_dict()) if learn.opt else None
    return dict(
        weights=[p.clone() for p in learn.model.state_dict().values()], rng=torch.get_rng_state(), np=np.random.get_state()[1],
        opt=opt, cbs=list(learn.cbs), dl=learn.dls.train, dl_rng=learn.dls.train.rng.getstate())

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,L)): return len(a)==len(b) and all(map(same, a, b))
    return a is b or a==b

def rows(losses, bs=64, n_steps=100, first=2.):
    known = dict(bs=bs, n_steps=n_steps, seconds=1.)
    return [dict(known, lr=k, loss=v, lost=math.isinf(v), losses=[first]+[v]*99, n=bs) for k,v in losses.items()]

# --- the mathematics of a race

def test_range_is_interpolated():
    "Between the best rates and worse ones, in the logarithm"
    race = Race(1e-3, rows({.01: math.exp(.06), .02: 1., .04: 1., .08: math.exp(.06)}))
    low,high = race.range_of(64, [100])
    assert math.isclose(low, .02/2**.5) and math.isclose(high, .04*2**.5)
    assert race.settle(64, [100]) and math.isclose(race.lr, (.02*.04)**.5)

def test_longer_races_count_more():
    "And a rate that did not run longer keeps how far it was behind"
    race = Race(1e-3, rows({.01: 1., .02: 1.1, .04: 2.}, n_steps=25) + rows({.01: 1.1, .02: 1.}, n_steps=75))
    e = race.excess(64, [25,75])
    assert np.allclose([e[.01],e[.02],e[.04]], [.75*math.log(1.1),.25*math.log(1.1),math.log(2)])

def test_away_from_the_cliff():
    "A rate that is good next to one that learned nothing is lowered, and a diverged one is no answer"
    race = Race(1e-3, rows({.1: 1.2, .2: 1., .4: 9.}))
    race.settle(64, [100])
    assert race.lr <= .4/2**1.5 and race.low > race.lr/2
    assert not Race(1e-3, rows({.1: math.inf, .2: math.inf})).settle(64, [100])

def test_nothing_learned_is_no_plateau():
    "At the beginning all rates have the loss of an untrained model; the tolerance is no more than half of what was learned"
    race = Race(1e-3, rows({.001: 2., .01: 1.999, .1: 1.98, 1.: 2.5}))
    race.at_rest[64,100] = 2.
    low,high = race.range_of(64, [100])
    assert low > .02 and high < .2

def test_negative_losses():
    "There is no logarithm, and the answer is the same"
    losses = {.01: 1.5, .02: 1.02, .04: 1., .08: 1.6}
    low,high = Race(1e-3, rows(losses)).range_of(64, [100])
    shifted = Race(1e-3, rows({k: v-5 for k,v in losses.items()}, first=-3.)).range_of(64, [100])
    assert shifted[0]/low==pytest.approx(1, abs=.15) and shifted[1]/high==pytest.approx(1, abs=.15)

def test_sizes_are_compared_by_end_and_way():
    race = Race(1e-3, rows({.01: 1.}, bs=64) + rows({.01: 1., .02: 1.5}, bs=128, first=4.) + rows({.01: .5}, bs=256))
    assert 0 < race.behind((128,100), (64,100)) < .01 and race.behind((256,100), (64,100)) < -.3
    assert race.behind((256,100), (64,100), per_item=True) < race.behind((256,100), (64,100))-1 # sums over a batch
    assert math.isinf(race.behind((32,100), (64,100)))

def test_a_lead_is_counted_in_time():
    "By what half of the time was worth, and by what chance does, if that is more"
    def race(half, most, chance=0.):
        noise = chance*np.random.default_rng(0).standard_normal((2,100))
        res = rows({.01: half}, n_steps=50) + rows({.01: most, .02: most}, n_steps=100)
        for o,e in zip(res[1:], noise): o['losses'] = list(np.array(o['losses'])+e)
        return Race(1e-3, res + rows({.01: .9*most}, bs=128, n_steps=50, first=1.8))
    def lead(*args): return race(*args).lead((128,50), (64,100))
    assert lead(2., 1.)==pytest.approx(-math.log(.9)/math.log(2), rel=.05)
    assert lead(1.2, 1.)==pytest.approx(-math.log(.9)/math.log(1.2), rel=.1)
    assert 0 < lead(1.2, 1., .2) < lead(1.2, 1.)/1.5
    assert lead(1.001, 1.)==3

class Stub(Races):
    "Races whose racers end with `loss(bs, rate, n_steps)`, as many as there is time for"
    def __init__(self, loss, n_racers=1000):
        self.race,self.loss,self.n_left,self.seconds = Race(1e-3),loss,n_racers,1.
    def run(self, bs, rate, n_steps):
        if rate in self.race.scores(bs, n_steps): return True
        if not self.n_left:
            self.race.ended = 'the time was over'
            return False
        self.n_left -= 1
        v = self.loss(bs, rate, n_steps)
        self.race.rows += [o for o in rows({rate: v}, bs, n_steps)]
        return True

def find_bs(races, bs=64, sizes=(16,32,64,128,256,512), predicted=lambda a,b: 0.):
    return races.find_bs(bs, .01, list(sizes), lambda b: 6400//b, lambda a,b: 1., predicted)

def valley_at(best, slope=.3):
    "Losses that fall with time, and grow with the distance from the best size and from a rate of 0.01"
    def loss(bs, rate, n_steps):
        part = n_steps*bs/6400 # of the time
        return part**-.2*math.exp(slope*abs(math.log2(bs/best))+.3*math.log2(rate/.01)**2)
    return loss

@pytest.mark.parametrize('best', [16,32,64,128,512])
def test_goes_to_the_best_size(best):
    races = Stub(valley_at(best))
    assert find_bs(races)==best==races.race.bs and races.race.predicted==64 and not races.race.ended
    assert (races.race.steps!=1)==(best!=64)
    if best!=64: # in less time than the steps alone would make it
        assert races.race.steps < 64/best
    assert races.race.rate==pytest.approx(.01, rel=.1)

@pytest.mark.parametrize('other', [32,128])
def test_a_prediction_counts_a_third(other):
    "Half a time is worth log(2)*0.2 here, so these are doublings of time"
    def winner(lead, predicted):
        races = Stub(valley_at(other, .2*math.log(2)*lead))
        return find_bs(races, sizes=sorted((64,other)), predicted=lambda a,b: predicted if a==other else -predicted)
    assert winner(.12, 0.)==other and winner(.07, 0.)==64
    assert winner(.12, -.1)==64 and winner(.07, .1)==other

@pytest.mark.parametrize('n_racers', range(40))
def test_time_is_over_in_a_race_of_sizes(n_racers):
    "Whenever that is, the answer is a size that has raced, with a rate of its own, and it is said"
    races = Stub(valley_at(512), n_racers)
    found = find_bs(races)
    assert found is None or (races.race.bs==found and races.race.scores(found, 6400//found))
    assert (found is None)==(races.race.predicted is None)
    assert found==512 or races.race.ended
    if found: assert races.race.rate==pytest.approx(.01, rel=1)

def recorder_of(noise_scale, predicted, bs, ahead):
    "Of a search and a race, on a machine where a step takes 1 ms and 0.01 ms an item"
    rec = BSRecorder()
    rec.keep(search=Search(train_bs=64, epochs=5, at_rest=50), profile=Profile([dict(
        bs=o, step_time=1e-3+1e-5*o, data_share=.1, memory=1., fits=True) for o in (32,64,128,256,512)]))
    rec.search.add(1, noise_scale, 1.)
    steps = 2**-ahead*(1e-3+1e-5*predicted)/(1e-3+1e-5*bs)
    rec.keep(race=Race(.01, lr=.01, bs=bs, predicted=predicted, steps=steps, search=rec.search))
    return rec

@pytest.mark.parametrize('noise_scale,bs', [(200.,128), (200.,256), (200.,64), (900.,512)])
def test_epochs_without_a_surprise(noise_scale, bs):
    "If the race agrees with the noise scale, whichever size it has gone to, the epochs are those of the noise scale"
    def seconds(b): return (1e-3+1e-5*b)*(1+noise_scale/b)
    rec = recorder_of(noise_scale, 128, bs, math.log2(seconds(128)/seconds(bs)))
    assert noise_scale_raced(rec)==pytest.approx(noise_scale)
    assert epochs_at(rec, bs)==round(5*(bs+noise_scale)/(64+noise_scale))

def test_epochs_of_few_steps():
    "A last batch that is left out is no step: 456 items make 7 steps of 64, and a single one of 256"
    rec = recorder_of(200., 128, 128, 0.)
    rec.search.n_items,rec.search.drop_last = 456,True
    steps = 5*7*(1+200/256)/(1+200/64)
    assert epochs_at(rec, 256)==round(steps)==15 and rec.search.steps(256)==1
    assert f'are 15 at 256, in {15*3.56/(5*7*1.64):.2g} of the time' in in_epochs(rec, 256)
    rec.search.drop_last = False
    assert epochs_at(rec, 256)==round(5*8/2*(1+200/256)/(1+200/64))

def test_an_infinite_noise_scale_and_a_race():
    "What the race says, but no less than what was measured"
    assert noise_scale_raced(recorder_of(math.inf, 128, 64, .1))==pytest.approx(54.1, rel=.01)
    rec = recorder_of(math.inf, 128, 64, .1)
    rec.search.lower[-1] = 100.
    assert noise_scale_raced(rec)==100.
    assert math.isinf(noise_scale_raced(recorder_of(math.inf, 128, 128, 0.)))

@pytest.mark.parametrize('bs,ahead,raced', [(256,.9,math.inf), (256,-9,0.), (64,.5,0.), (64,-9.,math.inf), (256,.2,985.), (64,.1,54.1)])
def test_epochs_by_the_race(bs, ahead, raced):
    "A larger size that is ahead means a larger noise scale, a smaller one that is ahead a smaller one; halfway, if eight times at most"
    found = noise_scale_raced(recorder_of(200., 128, bs, ahead))
    assert found==pytest.approx((200*min(1600, max(25, raced)))**.5, rel=.01)
    if 25 < raced < 1600: # it explains what was raced
        def seconds(b): return (1e-3+1e-5*b)*(1+found**2/200/b)
        assert math.log2(seconds(128)/seconds(bs))==pytest.approx(ahead)

def test_sizes_without_a_rate_that_works():
    "The predicted one is no answer then, and a neighbour doesn't win"
    races = Stub(lambda bs, rate, n_steps: math.inf if n_steps==100 else 1.)
    assert find_bs(races) is None and 'no learning rate got through with batches of 64' in races.race.ended
    ok = valley_at(128)
    assert find_bs(Stub(lambda bs, *o: math.inf if bs==128 else ok(bs, *o)))==64

# --- lr_race

def test_beats_other_rates():
    "Trained on for twice as long as the race, the rate that has won is ahead of rates eight times lower and higher"
    def loss(lr):
        learn = plain_learner()
        with learn.no_logging(): learn.fit_one_cycle(8, lr)
        return learn.validate()[0]
    learn = plain_learner()
    lr,low,high = learn.lr_race(show_plot=False)
    assert low <= lr*1.01 and lr <= high*1.01
    assert loss(lr) < min(loss(lr/8), loss(lr*8))

@pytest.mark.parametrize('trained', [False,True])
def test_leaves_no_trace(tmp_path, trained):
    "Bit for bit, and a training afterwards is what it would have been"
    learn,twin = (make_learner(tmp_path) for _ in range(2))
    if trained:
        for o in (twin,learn):
            torch.manual_seed(0)
            with o.no_logging(): o.fit(1)
    before,losses = state_of(learn),list(learn.recorder.losses) if trained else []
    learn.lr_race(seconds=2, show_plot=False)
    assert same(before, state_of(learn)) and (same(losses, list(learn.recorder.losses)) if trained else True)
    after = []
    for o in (learn,twin):
        torch.manual_seed(1)
        o.dls.train.rng.seed(1)
        with o.no_logging(): o.fit_one_cycle(1, 1e-3)
        after.append([p.clone() for p in o.model.parameters()])
    assert same(*after)

def test_is_repeatable(tmp_path):
    "The answer doesn't depend on the state of the random generators"
    def raced_with(seed):
        learn = make_learner(tmp_path)
        torch.manual_seed(seed)
        races = Races(learn, seconds=60)
        races.find(64, 50, 1e-3)
        return races.race.lr
    assert raced_with(1)==raced_with(2)

def test_groups_keep_their_ratio(tmp_path):
    "Slices and lists, and what is frozen stays as it is"
    def split(m): return L(m[:2], m[2:]).map(lambda o: list(o.parameters()))
    learn = make_learner(tmp_path, splitter=split)
    res = learn.lr_race(lr=slice(1e-5,1e-3), seconds=2, show_plot=False)
    assert all(isinstance(o, slice) and math.isclose(o.stop, 100*o.start) for o in res)
    res = learn.lr_race(lr=[1e-4,1e-3], seconds=2, show_plot=False)
    assert n_groups(learn)==2 and all(math.isclose(o[1], 10*o[0]) for o in res)
    learn.freeze()
    seen = []
    class Look(Callback):
        run_mock = True
        def after_batch(self): seen.append(self.model[0].weight.detach().clone())
    learn.add_cb(Look())
    learn.lr_race(seconds=3, show_plot=False)
    assert len(seen) > 100 and all(torch.equal(o, learn.model[0].weight) for o in seen)
    learn = make_learner(tmp_path, splitter=split, lr=slice(1e-5,1e-3))
    lr = learn.bs_find(seconds=6, show_plot=False).lr
    assert math.isclose(lr.stop, 100*lr.start)

def test_accumulated_gradients(tmp_path):
    "The rate belongs to the accumulated batch, steps are counted and not batches, and the callback is still there"
    learn = make_learner(tmp_path, bs=16, cbs=GradientAccumulation(64))
    seen = []
    class Look(Callback):
        run_mock = True
        def after_step(self): seen.append(self.opt.hypers[0]['lr'])
    learn.add_cb(Look())
    races = Races(learn, seconds=60)
    assert races.own_bs==64
    racer = races.train(64, 1e-2, 20)
    assert len(seen)==20 and len(racer.losses)==80 and max(seen)==1e-2 and seen[-1] < 3e-3
    learn.lr_race(seconds=2, show_plot=False)
    assert learn.recorder.race.bs==64 and learn._grab_cbs(GradientAccumulation)

def test_schedule_of_a_racer(tmp_path):
    "It rises, stays and falls, for all groups"
    learn,seen = make_learner(tmp_path),[]
    class Look(Callback):
        run_mock = True
        def after_step(self): seen.append(self.opt.hypers[0]['lr'])
    learn.add_cb(Look())
    Races(learn, seconds=60).train(64, 1e-3, 100)
    assert np.allclose(seen[:6], np.array([.2,.4,.6,.8,1,1])*1e-3)
    assert np.allclose(seen[4:81], 1e-3) and np.allclose(seen[-2:], [1e-4,5e-5])

def test_diverging_and_broken_losses(tmp_path):
    "Rates that are far too large are no answer; where all diverge, the error says so and the learner is as it was"
    learn = make_learner(tmp_path, opt_func=SGD)
    assert learn.lr_race(lr=1e5, seconds=20, show_plot=False).lr < 10
    learn.loss_func = lambda p,y: CrossEntropyLossFlat()(p, y)*math.nan
    before = state_of(learn)
    with pytest.raises(ValueError, match='no learning rate got through'): learn.lr_race(seconds=5, show_plot=False)
    with pytest.raises(ValueError, match='no learning rate got through the race: .*Look at the loss'):
        learn.bs_find(seconds=5, show_plot=False)
    assert same(before['weights'], state_of(learn)['weights'])

def test_fast_learners_have_not_diverged():
    "A loss that falls to a tenth in its first steps has a mean of three times its least; one that grows has diverged"
    def lost(losses):
        racer = Racer(len(losses))
        racer.losses = list(map(torch.tensor, losses))
        racer._look()
        return racer.lost
    falling = [2.3,2.3,2.,1.5,1.1,.9,.6,.4,.3,.2]
    assert not lost(falling) and not lost(falling+[2.]*10)
    assert lost(falling+[9.]*10) and lost(falling+[math.nan])
    assert not lost([-1.]*10+[5.]*10) # no share of a negative loss means anything

def test_fast_learners_of_the_digits(tmp_path):
    "The best rate for large batches is about that for small ones, or more"
    rates = {bs: make_learner(tmp_path).lr_race(bs, show_plot=False).lr for bs in (64,256)}
    assert rates[256] > rates[64]/1.5

def test_interrupt_keeps_what_was_raced(tmp_path):
    learn = make_learner(tmp_path)
    class Interrupt(Callback):
        run_mock,n = True,0
        def after_batch(self):
            Interrupt.n += 1
            if Interrupt.n==100: raise KeyboardInterrupt
    learn.add_cb(Interrupt())
    before = state_of(learn)
    with pytest.raises(KeyboardInterrupt): learn.lr_race(show_plot=False, seconds=8)
    assert same(before, state_of(learn)) and len(learn.recorder.lr_race_stats) >= 2

@pytest.mark.parametrize('phase', ['find','fit','find_bs','beside'])
def test_interrupted_recipe(tmp_path, monkeypatch, phase):
    "In every part of it: what was measured is kept, the learner is as before, and no size is said to have won that hasn't"
    learn,old = make_learner(tmp_path),getattr(Races, phase)
    def interrupted(self, *args, **kwargs):
        if phase=='fit' and not self.race.lr: return old(self, *args, **kwargs) # not before the measurement
        raise KeyboardInterrupt
    monkeypatch.setattr(Races, phase, interrupted)
    before = state_of(learn)
    with pytest.raises(KeyboardInterrupt): learn.bs_find(show_plot=False, seconds=8)
    assert same(before, state_of(learn)) and len(learn.recorder.bs_profile_stats)
    assert bool(learn.recorder.race.rows)==(phase!='find')
    if phase in ('find_bs','beside'): assert len(learn.recorder.noise_scale) and len(learn.recorder.bs_table())
    assert (learn.recorder.race.predicted is None)==(phase!='beside')

def test_progress_bar(tmp_path):
    "With fastai's own bar on the learner"
    learn = make_learner(tmp_path)
    learn.add_cb(ProgressCallback())
    assert learn.lr_race(seconds=2, show_plot=False).lr > 0 and learn._grab_cbs(ProgressCallback)
    assert learn.bs_find(seconds=6, show_plot=False).lr > 0

def test_out_of_memory(tmp_path):
    "At the own batch size there is an error that says what to do"
    class Full(Callback):
        def before_batch(self):
            if len(self.yb[0]) >= 64: raise RuntimeError('CUDA out of memory')
    learn = make_learner(tmp_path, cbs=Full())
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r'(?s)a batch of 64 does not fit .* `learn.lr_race\(bs=...\)`'):
        learn.lr_race(seconds=5, show_plot=False)
    assert learn.lr_race(bs=32, seconds=2, show_plot=False).lr > 0

def test_time_limit(tmp_path):
    "A slow training gets fewer and shorter racers"
    class Slow(Callback):
        run_mock = True
        def before_batch(self): time.sleep(.01)
    learn = make_learner(tmp_path, cbs=Slow())
    start = time.perf_counter()
    learn.lr_race(seconds=4, show_plot=False)
    assert time.perf_counter()-start < 12 # other tests run beside it
    assert learn.recorder.lr_race_stats.n_steps.max() < 88
    with pytest.raises(ValueError, match='the time was over'): learn.lr_race(seconds=.01, show_plot=False)
    with pytest.raises(ValueError, match='after 0 s the time was over'): learn.bs_find(seconds=.01, show_plot=False)

@pytest.mark.parametrize('seconds', [0, -1, math.inf, math.nan, '9', None, True])
def test_refuses_seconds(tmp_path, seconds):
    learn = make_learner(tmp_path)
    for f in (learn.lr_race, learn.bs_find):
        with pytest.raises(ValueError, match='seconds must be a positive, finite number'): f(seconds=seconds, show_plot=False)

@pytest.mark.parametrize('bs', ['a', 2.5, math.nan, [1e-3], slice(1e-3), True], ids=str)
def test_refuses_what_is_no_batch_size(tmp_path, bs):
    "The first argument of a race is a batch size, and not a learning rate as in a search"
    with pytest.raises(ValueError, match='bs must be a whole number'): make_learner(tmp_path).lr_race(bs, show_plot=False)

def test_says_where_it_is_not_sure(tmp_path):
    "A model that can't learn: all rates do as well"
    learn = plain_learner(loss=lambda p,y: CrossEntropyLossFlat()(p*0, y))
    learn.lr_race(seconds=5, show_plot=False)
    said = learn.recorder.lr_race_summary()
    assert 'nothing worse was found' in said or 'the time was over' in said
    with pytest.raises(ValueError, match='nothing was raced yet'): make_learner(tmp_path).recorder.lr_race_summary()

# --- the recipe

@pytest.fixture(scope='module')
def recipe():
    learn = make_learner()
    return learn,state_of_before(learn),learn.bs_find(epochs=5, seconds=12, show_plot=False)

def state_of_before(learn): return state_of(learn)

def test_recipe_answers(recipe):
    learn,before,sugg = recipe
    rec = learn.recorder
    assert sugg._fields==('fastest','critical','lr','epochs') and raced(rec)
    assert sugg.fastest in rec.profile.fitting() and sugg.lr==pytest.approx(lr_at(rec, sugg.fastest))
    assert same(before, state_of(learn))
    assert rec.race.predicted is None or (sugg.fastest,sugg.lr)==(rec.race.bs,rec.race.lr) # where other tests took the time
    table = rec.bs_table()
    assert table.lr[sugg.fastest]==sugg.lr and table.epochs[64]==5 and table.epochs[sugg.fastest]==sugg.epochs
    assert table.epochs.is_monotonic_increasing and 'fastest' in table.suggested[sugg.fastest]
    assert sugg.fastest==64 or f'5 epochs at 64 are {sugg.epochs} at {sugg.fastest}, in ' in rec.bs_find_summary()
    assert rec.search.at_rest > 0 and rec.settled().name==rec.bs_find_stats.index[-1]

def test_a_row_for_each_training(recipe):
    "The noise scale is averaged over short trainings, and the interval knows how far these lie apart"
    search = recipe[0].recorder.search
    noise,scale = (np.array(o)*np.arange(1, len(o)+1) for o in (search.noise,search.scale))
    singles = np.diff(noise, prepend=0)/np.diff(scale, prepend=0)
    assert 2 <= len(singles) <= 8 and len(set(singles.round(3)))==len(singles)
    assert search.noise_scale[-1]==pytest.approx(search.noise[-1]/search.scale[-1])
    assert (search.lower[-1],search.upper[-1])==pytest.approx(ratio_interval(
        np.diff(noise, prepend=0), np.diff(scale, prepend=0)), rel=1e-6)

def test_batches_of_a_recipe_can_be_counted(monkeypatch):
    "As many as asked for in all trainings together, in whole measurements"
    learn = make_learner()
    learn.bs_find(num_it=63, seconds=5, show_plot=False)
    assert learn.recorder.n_iter==[10,20,30,40,50,60]
    fit = Races.fit # at a rate that chance has not chosen, it gets so sure
    monkeypatch.setattr(Races, 'fit', lambda self, bs, rate, *args, **kwargs: fit(self, bs, min(rate, 3e-3), *args, **kwargs))
    learn.bs_find(num_it=5000, tol=.9, seconds=8, show_plot=False)
    search = learn.recorder.search
    assert 4 <= len(search.n_iter) <= 8 and search.within(.9) and search.ended_by_tol

def test_recipe_pictures(recipe):
    learn,_,sugg = recipe
    fig = learn.recorder.plot_lr_race(return_fig=True)
    left,right = fig.axes
    n = max(learn.recorder.race.rungs)
    bs = learn.recorder.race.bs
    assert len(left.lines)==(learn.recorder.lr_race_stats.query('bs==@bs and n_steps==@n')).shape[0]
    assert right.lines[-1].get_xdata()[0]==pytest.approx(learn.recorder.race.lr)

def test_pickles_without_the_race(recipe):
    rec = recipe[0].recorder
    assert not hasattr(pickle.loads(pickle.dumps(rec)), 'race')

def test_a_later_search_forgets_the_race():
    learn = make_learner()
    learn.bs_find(seconds=6, show_plot=False)
    assert raced(learn.recorder)
    sugg = learn.bs_find(1e-3, num_it=40, show_plot=False)
    assert not raced(learn.recorder) and sugg.lr==pytest.approx(lr_at(learn.recorder, sugg.fastest))
    assert lr_at(learn.recorder, 64)==pytest.approx(1e-3)

def test_lr_is_for_the_first_where_nobody_asks_for_the_fastest():
    learn = make_learner()
    sugg = learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=(BSSuggestion.Efficient,BSSuggestion.Critical))
    bs = sugg.efficient or sugg.critical or 64
    assert sugg._fields==('efficient','critical','lr') and sugg.lr==pytest.approx(lr_at(learn.recorder, bs))
    assert learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None) is None

def test_loaders_that_keep_their_size():
    "Batches that are ready-made: rates race, sizes can't"
    xs,ys = (torch.stack(o) for o in zip(*[(x,y) for x,y in digits()[:960]]))
    batches = [(xs[i:i+32], ys[i:i+32]) for i in range(0, 960, 32)]
    dl = DataLoader(batches, bs=None, shuffle=True)
    learn = Learner(DataLoaders(dl, dl), nn.Sequential(nn.Flatten(), nn.Linear(64,10)), CrossEntropyLossFlat(), cbs=[])
    with learn.no_bar(), pytest.warns(UserWarning, match='no batch size could be timed'):
        sugg = learn.bs_find(seconds=6, show_plot=False)
    assert sugg.fastest is None and sugg.lr > 1e-3

def test_losses_that_are_sums():
    "A batch twice as large has a loss twice as large, and isn't behind for that"
    learn = plain_learner(loss=CrossEntropyLossFlat(reduction='sum'), opt_func=SGD)
    sugg = learn.bs_find(seconds=8, show_plot=False)
    assert sugg.fastest >= 32 and sugg.lr > 0

def test_epochs_are_checked():
    learn = make_learner()
    for o in (0, -1, 'five', True):
        with pytest.raises(ValueError, match='epochs must be a positive number'): learn.bs_find(epochs=o)

def test_given_rate_races_nothing(tmp_path):
    learn = make_learner(tmp_path)
    sugg = learn.bs_find(1e-3, num_it=40, epochs=3, show_plot=False)
    assert not len(learn.recorder.lr_race_stats) and sugg.epochs==epochs_at(learn.recorder, sugg.fastest)

def test_a_search_keeps_to_its_seconds(tmp_path):
    "Without `num_it`, an epoch that is long is not gone through to its end"
    class Slow(Callback):
        run_mock = True
        def before_batch(self): time.sleep(.02)
    learn = make_learner(tmp_path, bs=4, cbs=Slow())
    learn.bs_find(1e-3, seconds=2, show_plot=False, suggest_funcs=None)
    assert 10 <= learn.recorder.search.n_iter[-1] < 200 < len(learn.dls.train)
