"Bad input is refused before any work starts, with what was found, what was expected and what to do."
import math, random, re
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from fastai.learner import Recorder
from fastai.torch_core import params
from torch import nn, tensor
from fastai_bs_finder.all import BSFinder, BSSuggestion, EndSearch
from fastai_bs_finder.gradients import AccumulateEstimator, SequentialEstimator, SplitEstimator
from fastai_bs_finder.suggest import critical
from helpers import make_learner, plain_learner, same, search, Stream, weights

def refused(learn, match, exc=ValueError, **kwargs):
    "`bs_find` refuses, and neither the model nor the data nor an optimizer was touched"
    calls,before,rand,modes = [],weights(learn),random.getstate(),[m.training for m in learn.model.modules()]
    learn.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(exc, match=match): learn.bs_find(**kwargs)
    assert not calls and same(before, weights(learn)) and random.getstate()==rand
    assert [m.training for m in learn.model.modules()]==modes
    assert learn.opt is None and not plt.get_fignums()
    assert not getattr(learn.recorder, 'losses', None)

@pytest.mark.parametrize('lr', [
    0, -1e-3, math.nan, math.inf, -math.inf, slice(0,1e-2), slice(1e-3,math.nan), slice(math.inf), [1e-3,-1e-3],
    np.array([1e-3,0.]), tensor(-1.)], ids=str)
def test_lr(learn, lr):
    "A learning rate that is not positive and finite, also within a slice or a list"
    refused(learn, 'lr must be positive and finite.*lr_race', lr=lr)

def test_default_lr(learn):
    "Without one, rates race from the learner's own on"
    assert search(learn, lr=None, seconds=20).lr > 0 and learn.recorder.race.lr
    learn.lr = math.nan
    with pytest.raises(ValueError, match='lr must be positive and finite.*lr_race'): search(learn, lr=None)

@pytest.mark.parametrize('n_batch', [1,0,-3])
def test_n_batch(learn, n_batch):
    "One batch in a window has nothing to be compared with"
    refused(learn, 'n_batch must be at least 2', lr=1e-2, n_batch=n_batch)

@pytest.mark.parametrize('kwargs', [dict(num_it=9), dict(num_it=0), dict(num_it=-40), dict(num_it=5, n_batch=3)], ids=str)
def test_num_it(learn, kwargs):
    "Too few batches for two windows"
    refused(learn, 'at least 2 measurements.*Raise num_it or lower n_batch', lr=1e-2, **kwargs)

@pytest.mark.parametrize('kwargs,n', [
    (dict(num_it=10),2), (dict(num_it=14),2), (dict(num_it=4,n_batch=2),2), ({},40), (dict(n_batch=22),10)], ids=str)
def test_num_it_whole_windows(learn, kwargs, n):
    "The least that is not refused, whole windows only; and by default an epoch, at least 200 batches and ten windows"
    learn.bs_find(1e-2, show_plot=False, suggest_funcs=BSSuggestion.Critical, **kwargs)
    nb = kwargs.get('n_batch', 5)
    assert learn.recorder.search.n_iter==[nb*(i+1) for i in range(n)]

@pytest.mark.parametrize('bs', [0,-1,1438,10**6])
def test_bs(learn, bs):
    "A batch cannot be larger than the training set, nor empty"
    refused(learn, 'bs must be between 1 and the 1,437 items', lr=1e-2, bs=bs)

def test_bs_of_the_loader_is_checked_too(tmp_path):
    "Also when the loader has that very batch size"
    refused(make_learner(tmp_path, bs=2000), 'bs must be between 1 and the 1,437 items', lr=1e-2, bs=2000)

def test_loader_without_a_batch(tmp_path):
    "A training set smaller than a batch, with `drop_last`"
    refused(make_learner(tmp_path, bs=2000), 'no batch.*Pass a smaller bs', lr=1e-2)

def test_smaller_bs_helps(tmp_path):
    "What the message advises works"
    assert search(make_learner(tmp_path, bs=2000), bs=64) is not None

@pytest.mark.parametrize('bs', [1,1437])
def test_extreme_bs(learn, bs):
    "The limits themselves are allowed"
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64,10)) # batch norm takes no batch of one
    assert search(learn, bs=bs, num_it=4, n_batch=2) is not None

def test_bs_needs_fastai_loader(learn):
    "PyTorch's loader cannot be made anew with another batch size"
    learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train.dataset, batch_size=64)
    refused(learn, 'another batch size needs a fastai DataLoader', lr=1e-2, bs=32)

@pytest.mark.parametrize('new', [
    lambda ds: DataLoader(ds, bs=64, num_workers=0),
    lambda ds: torch.utils.data.DataLoader(ds, batch_size=64)], ids=['fastai','pytorch'])
def test_loader_without_length(learn, new):
    "The message says what to pass instead"
    learn.dls.loaders[0] = new(Stream(learn.dls.train.dataset))
    refused(learn, r'no length.*n=', lr=1e-2)

def test_loader_with_given_length(learn):
    "What the message advises works"
    learn.dls.loaders[0] = DataLoader(Stream(learn.dls.train.dataset), bs=64, n=1437, num_workers=0)
    assert search(learn) is not None

def test_no_trainable_parameter(learn):
    "Everything is frozen: say how to unfreeze"
    for p in learn.model.parameters(): p.requires_grad_(False)
    refused(learn, 'no trainable parameter.*unfreeze', lr=1e-2)

def test_unfreeze_helps(learn):
    "What the message advises works where `freeze_to` froze all groups"
    learn.splitter = lambda m: [params(m[0]), params(m[2:])] # batch norm would stay trainable
    learn.freeze_to(2)
    with pytest.raises(ValueError, match='no trainable parameter.*unfreeze'): search(learn)
    learn.unfreeze()
    assert search(learn) is not None

def test_advice_for_a_model_frozen_by_hand(learn):
    "What the message advises works also where the user froze the parameters without fastai"
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError) as e: search(learn)
    for advice in re.findall('`(.+?)`', str(e.value)): eval(advice)
    assert search(learn) is not None

def test_no_parameter_of_the_optimizer_is_trainable(learn):
    "The splitter leaves out what could be trained: the optimizer would have nothing to do"
    learn.splitter = lambda m: [[m[0].weight]]
    learn.model[0].weight.requires_grad_(False)
    refused(learn, 'no trainable parameter.*unfreeze', lr=1e-2)

def test_no_loss(learn):
    "A learner without a loss function"
    learn.loss_func = None
    refused(learn, 'no loss function: pass one', lr=1e-2)

def test_no_target(learn):
    "Batches without a target have no loss"
    learn.dls.loaders[0] = learn.dls.train.new([(o[0],) for o in learn.dls.train.dataset])
    before = weights(learn)
    for f in (lambda: learn.bs_find(1e-2), learn.bs_profile):
        with pytest.raises(ValueError, match='no target'): f()
    assert same(before, weights(learn)) and learn.opt is None

def test_method(learn):
    "An unknown method: name those that there are"
    refused(learn, "'accumulate', 'split', 'per_example', 'sequential'", lr=1e-2, method='exact')

@pytest.mark.parametrize('beta', [-.1,1.01,math.nan])
def test_beta(learn, beta):
    "A decay that is none"
    refused(learn, 'beta must be', lr=1e-2, beta=beta)

@pytest.mark.parametrize('kwargs', [dict(n_batch=2.5), dict(num_it=40.), dict(bs=32.5), dict(num_it=math.nan)], ids=str)
def test_whole_numbers(learn, kwargs):
    "Numbers of batches and items are whole"
    refused(learn, 'must be a whole number', **kwargs)

@pytest.mark.parametrize('kwargs,match', [
    (dict(lr='x'), "lr must be positive and finite, got 'x'"),
    (dict(suggest_funcs=BSSuggestion), 'must be functions of the recorder'),
    (dict(suggest_funcs=3), 'must be functions of the recorder')], ids=str)
def test_other_types(learn, kwargs, match):
    "What is no number or no function is refused before the search"
    refused(learn, match, **kwargs)

def test_empty_training_set(learn):
    "A learner that was loaded for inference has no data"
    learn.dls.loaders[0] = learn.dls.train.new([])
    refused(learn, 'training set is empty.*load_learner')

@pytest.mark.parametrize('tol', [0,1,25,-.1])
def test_tol_is_a_share(learn, tol):
    refused(learn, 'tol must be between 0 and 1', lr=1e-2, tol=tol)
    assert type(learn.recorder) is Recorder

def test_end_of_a_search(learn):
    "What ends a fit needs to know what it looks at, and when"
    for bad in (2.5, '3'):
        with pytest.raises(ValueError, match='num_it must be a whole number'): EndSearch(BSFinder(), bad)
    with learn.no_logging(), pytest.raises(ValueError, match='looks at a BSFinder in the same fit'):
        learn.fit(1, cbs=EndSearch(BSFinder(), 10))

def test_options_of_the_finder_go_by_name():
    with pytest.raises(TypeError): BSFinder(60)

@pytest.mark.parametrize('cls,nm', [(AccumulateEstimator,'n_batch'), (SequentialEstimator,'n_batch'), (SplitEstimator,'k')])
def test_estimators_check_their_own(cls, nm):
    with pytest.raises(ValueError, match=f'{nm} must be a whole number'): cls(2.5)
    with pytest.raises(ValueError, match=f'{nm} must be at least 2'): cls(1)

@pytest.mark.parametrize('kwargs,match', [
    (dict(k=1),'k must be at least 2'), (dict(k=2.5),'k must be a whole number'),
    (dict(reduction='none'),"reduction must be 'mean', 'sum' or None")], ids=str)
def test_other_parameters(learn, kwargs, match):
    with pytest.raises(ValueError, match=match): search(learn, method='split', **kwargs)

def test_batches_too_small_to_cut():
    "That is known beforehand, and said; the callback can only say it afterwards"
    learn = plain_learner(bs=3)
    with pytest.raises(ValueError, match="at least 4 items in it, got batches of 3. Use method='accumulate'"):
        search(learn, method='split')
    with pytest.raises(ValueError, match='at least 2 items in it, got batches of 1'): search(learn, method='per_example', bs=1)
    assert search(learn) is not None and search(learn, method='split', bs=4, num_it=200) is not None

@pytest.mark.parametrize('kind', ['FSDP','DistributedType.DEEPSPEED','XLA'])
@pytest.mark.parametrize('call', ['bs_find','bs_profile','lr_race'])
def test_processes_without_a_gradient_of_their_own(learn, kind, call):
    class DistributedTrainer(Callback): accelerator = SimpleNamespace(distributed_type=kind)
    learn.add_cb(DistributedTrainer())
    with pytest.raises(ValueError, match=f'set up for {kind.split(".")[-1]}, and what is compared here are gradients of processes'):
        getattr(learn, call)()

def test_accumulation_twice(learn):
    "Two callbacks that decide when to step are one too many in a real fit; a search leaves the other one out"
    learn.add_cb(GradientAccumulation(128))
    with learn.no_logging(), pytest.raises(ValueError, match='remove one of them'): learn.fit(1, cbs=BSFinder())
    assert search(learn).critical

def test_a_finder_on_the_learner():
    "It takes no part in a search, and two in a fit are one too many"
    learn,other = plain_learner(),plain_learner()
    learn.add_cb(BSFinder(method='split'))
    search(learn), search(other)
    pd.testing.assert_frame_equal(learn.recorder.bs_find_stats, other.recorder.bs_find_stats)
    with learn.no_logging(), pytest.raises(ValueError, match='a BSFinder on the learner already'): learn.fit(1, cbs=BSFinder())

# --- suggestion functions

def biggest(rec): return int(max(rec.noise_scale))

def _hidden(rec): return 1

def other():
    def biggest(rec): return 7
    return biggest

class Callable_:
    def __call__(self, rec): return 3

@pytest.mark.parametrize('funcs', [
    (biggest,other()), (biggest,biggest), (biggest,partial(biggest)),
    (BSSuggestion.Critical,critical)], ids=['namesakes','twice','partial','critical'])
def test_two_of_the_same_name(learn, funcs):
    "Two fields of the result cannot have the same name"
    refused(learn, 'name of its own.*`def`', lr=1e-2, suggest_funcs=funcs)

@pytest.mark.parametrize('f', [lambda rec: 1, partial(lambda rec: 1)], ids=['lambda','partial'])
def test_lambda(learn, f):
    "A lambda has no name for a field"
    refused(learn, 'name of its own.*`def`', lr=1e-2, suggest_funcs=f)

def test_leading_underscore(learn):
    "A named tuple takes no field of such a name: better said before the work than after it"
    refused(learn, 'name', lr=1e-2, suggest_funcs=_hidden)

def test_result(learn):
    "One field a function, in their order, named after it, a partial after what it wraps and an object after its class"
    def scaled(rec, k): return k*10
    def nothing(rec): return None
    res = search(learn, suggest_funcs=(BSSuggestion.Critical, partial(scaled, k=4), Callable_(), nothing), show_plot=True)
    assert res._fields==('critical','scaled','Callable_','nothing','lr') and res[1:-1]==(40,3,None)
    assert res.critical==critical(learn.recorder)

@pytest.mark.parametrize('funcs', [None,()])
def test_measure_only(learn, funcs):
    "No suggestion, but the measurements"
    assert search(learn, suggest_funcs=funcs) is None and len(learn.recorder.noise)==3 and learn.opt is None

@pytest.mark.parametrize('kwargs,match', [
    (dict(bs='32'), "bs must be a whole number, got '32'"), (dict(bs=2.5), 'bs must be a whole number'),
    (dict(num_it='40'), "num_it must be a whole number, got '40'"), (dict(wd='x'), "wd must be a number, at least 0, got 'x'"),
    (dict(n_batch='5'), "n_batch must be a whole number, got '5'"), (dict(tol='a'), "tol must be between 0 and 1, got 'a'"),
    (dict(beta=None), 'beta'), (dict(k='4', method='split'), "k must be a whole number, got '4'")], ids=str)
def test_none_and_strings_for_numbers(learn, kwargs, match): refused(learn, match, lr=1e-2, **kwargs)

@pytest.mark.parametrize('answer', [math.nan, -8, 0, 'sixty-four', None, math.inf, [64], 2.5, np.int64(64), tensor(64)], ids=str)
def test_whatever_a_suggestion_function_says(learn, answer):
    "The result survives the picture"
    def mine(rec): return answer
    res = search(learn, suggest_funcs=(BSSuggestion.Critical, mine), show_plot=True)
    assert res.mine is answer and res.critical
    learn.recorder.plot_bs_tradeoff((BSSuggestion.Critical, mine)), str(learn.recorder.bs_table((mine,)))

def test_a_search_that_runs_out_of_memory(learn):
    "What does not fit is said with what to do about it"
    class Full(Callback):
        def before_batch(self):
            if len(self.yb[0]) > 16: raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    learn.add_cb(Full())
    before = weights(learn)
    words = r'(?s)a batch of 64 does not fit .*`learn.bs_find\(bs=...\)`.*`learn.bs_profile\(\)` says which sizes fit'
    with pytest.raises(torch.cuda.OutOfMemoryError, match=words): search(learn)
    assert same(before, weights(learn))
    assert search(learn, bs=16) is not None
