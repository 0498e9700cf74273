"Suggestions and the table over them: by hand, from a recorder whose numbers are known."
import math, warnings

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai_bs_finder.profile import Profile
from fastai_bs_finder.recorder import BSRecorder, Search
from fastai_bs_finder.suggest import critical, efficient, fastest, fits
from helpers import make_learner

def recorded(noise_scale=500., lower=400., upper=650., profile=True, overhead=2e-3, per_item=2e-5, most=1024, end=None, **kwargs):
    "A recorder after a search with one measurement, and a profile in which batches up to `most` fit"
    rec,search = BSRecorder(),Search(**dict(n_items=60_000, train_bs=64, lr=.01) | kwargs)
    search.bs = search.train_bs
    known = math.isfinite(noise_scale)
    search.add(200, noise_scale if known else 1., 1. if known else -1., lower, upper)
    def row(bs):
        if bs > most: return dict(bs=bs, step_time=math.nan, data_share=math.nan, memory=math.nan, fits=False)
        return dict(bs=bs, step_time=overhead+per_item*bs, data_share=.2, memory=(20+bs)*2.**20, fits=True)
    rows = [row(2**i) for i in range(3,12) if 2**i <= search.n_items]
    rec.keep(search=search)
    if profile: rec.keep(profile=Profile(rows, end or '2,048 did not fit: out of memory'))
    return rec

@pytest.mark.parametrize('ns', [3., 60., 500., 5000., math.inf])
@pytest.mark.parametrize('overhead', [0., 1e-4, 2e-3, 1.])
def test_fastest_is_the_least_of_all(ns, overhead):
    "By brute force; with an infinite noise scale the throughput decides"
    rec = recorded(ns, overhead=overhead)
    sizes = [2**i for i in range(3,11)]
    cost = {b: (overhead+2e-5*b)*((1+ns/b) if math.isfinite(ns) else 1/b) for b in sizes}
    assert cost[fastest(rec)] <= min(cost.values())*(1+1e-9)

def test_fastest_does_not_exceed_what_fits():
    assert fastest(recorded(1e6, overhead=1., most=128))==128
    assert fits(recorded(most=128))==128

@pytest.mark.parametrize('f,wanted', [(critical,4096), (efficient,1024)])
def test_limits_are_said(f, wanted):
    said = rf"{f.__name__} would be {wanted:,}, but 256 is the largest batch that was tried and works \(2,048 did not fit: out of memory\), so it is 256.*bs_table"
    with pytest.warns(UserWarning, match=said):
        assert f(recorded(4096., most=256))==256
    with pytest.warns(UserWarning, match=f"{f.__name__} would be {wanted:,}, but the training set has 100 items, so it is 64"):
        assert f(recorded(4096., n_items=100))==64
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert f(recorded(4096., profile=False))==wanted

@pytest.mark.parametrize('share', [.5,.8,.9,.99])
def test_efficiency_is_kept(share):
    "The largest power of two that wastes no more"
    bs = efficient(recorded(500.), share)
    assert 1/(1+bs/500) >= share > 1/(1+2*bs/500)

def test_no_profile():
    "What needs one says so; the table does without"
    rec = recorded(profile=False)
    for f in (fastest,fits):
        with pytest.raises(ValueError, match=r'call `learn.bs_profile\(\)` first'): f(rec)
    table = rec.bs_table()
    assert 'time' not in table and 'fits' not in table and table.suggested.loc[512]=='critical'

@pytest.mark.parametrize('answer', [np.array([64,128]), torch.tensor([1,2]), pd.Series([1,2]), 2**70, 1e300, 10**400, 'many', -1, None], ids=str)
def test_answers_that_are_no_batch_sizes(learn, answer):
    "They are returned as they are, and neither in the table nor in a picture"
    def mine(rec): return answer
    res = learn.bs_find(1e-2, num_it=40, suggest_funcs=mine)
    assert res.mine is answer
    assert set(learn.recorder.bs_table(suggest_funcs=(mine,)).suggested)=={''}
    learn.recorder.plot_bs_tradeoff(suggest_funcs=(mine,))

def test_nothing_measured():
    with pytest.raises(ValueError, match=r'call `learn.bs_find\(\)` first'): BSRecorder().bs_table()
    with pytest.raises(ValueError, match=r'call `learn.bs_find\(\)` first'): BSRecorder().plot_bs_tradeoff()

def test_table_by_hand():
    table = recorded().bs_table()
    b = table.index.to_numpy()
    t = lambda b: 2e-3+2e-5*b
    few = table[table.index<=1024]
    assert np.allclose(table.steps, (1+500/b)/(1+500/64)) and np.allclose(table.examples, table.steps*b/64)
    assert np.allclose(table.efficiency, 1/(1+b/500))
    assert np.allclose(few.time, few.steps*t(few.index)/t(64))
    assert np.allclose(table.time[2048], table.steps[2048]*2*t(1024)/t(64)), 'two micro-batches of 1,024'
    for ns,c in ((400,'a'),(650,'b')): few = few.assign(**{c: (1+ns/few.index)/(1+ns/64)*t(few.index)/t(64)})
    assert np.allclose(few.time_from, few[['a','b']].min(axis=1)) and np.allclose(few.time_to, few[['a','b']].max(axis=1))
    assert (table.time_from <= table.time+1e-9).all() and (table.time <= table.time_to+1e-9).all()
    assert np.allclose(table.lr.astype(float), .01*b/64*(64+500)/(b+500))
    assert table.fits.tolist()==['yes']*8+['no']

@pytest.mark.parametrize('kwargs', [
    dict(noise_scale=math.inf, lower=300., upper=math.inf), dict(noise_scale=5., lower=0., upper=20.),
    dict(n_items=100, noise_scale=3000.), dict(train_bs=50), dict(train_bs=5000), dict(most=8), dict(upper=math.inf)])
def test_odd_recorders(kwargs):
    "Every row has its numbers, and the picture can be drawn"
    rec = recorded(**kwargs)
    table = rec.bs_table()
    numbers = table[['steps','examples','efficiency','time','time_from','time_to','lr']].astype(float)
    assert np.isfinite(numbers).all().all()
    now = rec.search.train_bs
    assert now > rec.search.n_items or np.allclose(table.loc[now, ['steps','examples','time']].astype(float), 1)
    assert max(table.index) <= max(rec.search.n_items, 1)
    str(table), table._repr_html_(), rec.plot_bs_tradeoff(return_fig=True).savefig('/dev/null', format='png')

def test_how_is_python(learn):
    "What the column says can be pasted, with and without accumulation"
    learn.bs_find(1e-2, num_it=40, show_plot=False, suggest_funcs=None)
    learn.bs_profile(max_bs=128, show_plot=False)
    table = learn.recorder.bs_table()
    assert table.how.iloc[-1].endswith('# batch norm sees 128 items') and table.fits.iloc[-1]=='not tried'
    exec(table.how.iloc[0], globals(), dict(learn=learn))
    assert learn.dls.train.bs==table.index[0]
    exec(table.how.iloc[-1], globals(), dict(learn=learn))
    assert learn.dls.train.bs==128
    steps = []
    class Steps(Callback):
        order = 1000
        def before_step(self): steps.append(self.train_iter)
    with learn.no_logging(): learn.fit(1, cbs=Steps())
    assert len(steps)==11*128//table.index[-1]

@pytest.mark.parametrize('most,bs,micro', [(64,100,50), (50,128,32), (128,256,128), (100,101,1)])
def test_accumulated_batch_has_its_size(most, bs, micro):
    "fastai steps as soon as `bs` items are through, so the micro-batch divides it"
    rec = recorded(profile=False, train_bs=bs)
    rec.keep(profile=Profile([dict(bs=most, step_time=1., data_share=0., memory=1., fits=True)]))
    assert f'with_bs({micro});' in rec.bs_table().how[bs]

def test_accumulation_does_not_pile_up(tmp_path):
    "Pasting two rows one after the other leaves one callback"
    learn = make_learner(tmp_path)
    learn.bs_find(1e-2, num_it=40, show_plot=False, suggest_funcs=None)
    learn.bs_profile(max_bs=64, show_plot=False)
    how = learn.recorder.bs_table().how
    for bs in (128,256): exec(how[bs], globals(), dict(learn=learn))
    assert [o.n_acc for o in learn._grab_cbs(GradientAccumulation)]==[256] and learn.dls.train.bs==64
    exec(how[32], globals(), dict(learn=learn))
    assert not learn._grab_cbs(GradientAccumulation) and learn.dls.train.bs==32

def test_fastest_at_the_end_of_the_profile_says_so():
    with pytest.warns(UserWarning, match='fastest is 128, the largest batch size that was tried.*out of memory'):
        assert fastest(recorded(1e6, overhead=1., most=128, end='256 did not fit: out of memory'))==128
    with warnings.catch_warnings(): # a training set can't be more than one batch
        warnings.simplefilter('error')
        assert fastest(recorded(1e6, overhead=1., most=128, n_items=200))==128

def test_before_a_search(tmp_path):
    rec = make_learner(tmp_path).recorder
    for f in (rec.bs_table, rec.plot_bs_tradeoff):
        with pytest.raises(ValueError, match=r'call `learn.bs_find\(\)` first'): f()
    with pytest.raises(ValueError, match=r'call `learn.bs_profile\(\)` first'): rec.plot_bs_profile()
