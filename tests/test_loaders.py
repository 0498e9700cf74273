"`with_bs` for every kind of loader that fastai makes: the same items in the same order, other batches."
import random
from types import MethodType

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.collab import CollabDataLoaders
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fastai.tabular.core import Categorify, FillMissing, TabularPandas, TabWeightedDL
from fastai.tabular.data import TabularDataLoaders
from fastai.text.data import LMDataLoader, SortedDL
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from torch import tensor
from helpers import digits, loaders, make_learner, small_table, Stream

columns = dict(cat_names=['kind'], cont_names=['a','b'], y_names='y', y_block=CategoryBlock())

def tabular():
    return TabularDataLoaders.from_df(small_table(200), procs=[Categorify,FillMissing,Normalize], bs=16, device='cpu', **columns)

def weighted_table():
    splits = list(range(160)), list(range(160,200))
    to = TabularPandas(small_table(200), procs=[Categorify,FillMissing,Normalize], splits=splits, **columns)
    train = TabWeightedDL(to.train, bs=16, wgts=np.arange(160)%4==0, shuffle=True)
    return DataLoaders(train, TabWeightedDL(to.valid, bs=16), device='cpu')

def collab():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0,20,300), item=rng.integers(0,30,300), rating=rng.integers(1,6,300)))
    return CollabDataLoaders.from_df(df, bs=16, seed=0, device='cpu')

def picture(i): return PILImage.create((digits()[i][0][0]*255).byte().numpy())
def images():
    blocks = ImageBlock, CategoryBlock
    block = DataBlock(blocks, get_x=picture, get_y=lambda i: int(digits()[i][1]), batch_tfms=aug_transforms(size=8))
    return block.dataloaders(list(range(200)), bs=16, device='cpu')

def padded(b): return [(torch.cat([x, x.new_zeros(13-len(x))]), y) for x,y in b]
def sorted_texts():
    texts = [(tensor(np.arange(1+i%13)), i%2) for i in range(200)]
    train = SortedDL(texts[:160], bs=16, shuffle=True, before_batch=padded)
    return DataLoaders(train, SortedDL(texts[160:], bs=16, before_batch=padded), device='cpu')

def language_model():
    def dl(n, shuffle): return LMDataLoader([tensor(np.arange(i, i+50)) for i in range(n)], bs=8, seq_len=5, shuffle=shuffle)
    return DataLoaders(dl(60, True), dl(20, False), device='cpu')

def weighted():
    train = WeightedDL(digits()[:200], bs=16, wgts=np.arange(200)%3==0, shuffle=True, drop_last=True)
    return DataLoaders(train, WeightedDL(digits()[200:300], bs=16), device='cpu')

def partial_():
    train = PartialDL(digits()[:200], bs=16, partial_n=70, shuffle=True)
    return DataLoaders(train, PartialDL(digits()[200:300], bs=16), device='cpu')

def plain(): return loaders(200, 16)

def stream():
    def dl(): return DataLoader(Stream(digits()[:200]), bs=16, n=200)
    return DataLoaders(dl(), dl(), device='cpu')

kinds = [tabular, weighted_table, collab, sorted_texts, language_model, weighted, partial_, plain, stream]

def sizes(dl): return [len(b[-1]) for b in dl]

@pytest.mark.parametrize('make', kinds, ids=lambda o: o.__name__.strip('_'))
def test_other_batches(make):
    "Batches of the new size as long as there are items; classes, path and device stay, and so does the original"
    set_seed(0)
    dls = make()
    old,res = [dl.bs for dl in dls.loaders],dls.with_bs(32)
    assert type(res) is type(dls) and res.path==dls.path and res.device==dls.device and [dl.bs for dl in dls.loaders]==old
    for a,b in zip(dls.loaders, res.loaders):
        assert type(a) is type(b) and b.bs==32 and b.drop_last==a.drop_last and b.shuffle==a.shuffle and b.dataset is a.dataset
        got = sizes(b)
        assert len(got)==len(b) and set(got[:-1]) <= {32}
        assert sum(got) >= sum(sizes(a))-32*a.drop_last-32*isinstance(a, LMDataLoader)
    assert [dl.bs for dl in dls.with_bs(32, val_bs=24).loaders]==[32,24]

@pytest.mark.parametrize(
    'make', [tabular, weighted_table, collab, weighted, partial_, plain, stream], ids=lambda o: o.__name__.strip('_'))
def test_same_items_in_the_same_order(make):
    "As the loader itself would draw them next, whatever its kind, from the same random state"
    set_seed(0)
    dls = make()
    res = dls.with_bs(32)
    def targets(dl):
        set_seed(1)
        return torch.cat([b[-1].flatten() for b in dl])
    a,b = targets(dls.train),targets(res.train)
    n = min(len(a), len(b))
    assert n > 60 and torch.equal(a[:n], b[:n])

@pytest.mark.parametrize('make', kinds, ids=lambda o: o.__name__.strip('_'))
def test_draws_no_random_numbers(make):
    set_seed(0)
    dls = make()
    dls.train.n_inp if hasattr(dls.train, '_one_pass') else None
    states = random.getstate(),np.random.get_state()[1].copy(),torch.get_rng_state()
    dls.with_bs(32)
    assert states[0]==random.getstate() and (states[1]==np.random.get_state()[1]).all()
    assert torch.equal(states[2], torch.get_rng_state())

def test_weights_and_parts_are_kept():
    assert all(int(i)%3==0 for i in weighted().with_bs(32).train.get_idxs())
    assert len(partial_().with_bs(32).train.get_idxs())==70
    assert set(np.unique(weighted_table().with_bs(32).train.get_idxs())) <= set(range(0, 160, 4))

def test_language_model_goes_on_where_it_was():
    "Each row of a batch continues the same row of the batch before"
    dl = language_model().with_bs(4).valid
    batches = [x for x,_ in dl]
    text = torch.cat([b[0] for b in batches])
    assert len(batches[0])==4 and torch.equal(text, torch.cat([torch.arange(i, i+50) for i in range(20)])[:len(text)])

def test_transforms_are_kept():
    set_seed(0)
    dls = images()
    res = dls.with_bs(32)
    assert [type(o) for o in res.train.after_batch.fs]==[type(o) for o in dls.train.after_batch.fs] and res.vocab==dls.vocab
    assert res.one_batch()[0].shape[0]==32 and res.one_batch()[0].shape[-2:]==(8,8)

def test_workers_are_kept():
    dl = DataLoader(digits()[:64], bs=8, num_workers=1, persistent_workers=True, pin_memory=False).with_bs(16)
    assert dl.fake_l.num_workers==1 and dl.fake_l.persistent_workers

@pytest.mark.parametrize('bs', [0, -1, 2.5, '8'])
def test_bad_sizes(bs):
    with pytest.raises(ValueError, match='bs must be a whole number'): plain().with_bs(bs)

def test_loaders_that_have_no_batch_size():
    with pytest.raises(ValueError, match='ready-made'): DataLoader(digits()[:8], bs=None).with_bs(4)
    with pytest.raises(ValueError, match='build your loaders with that batch size'):
        DataLoaders(torch.utils.data.DataLoader(digits()[:8])).with_bs(4)

def test_length_that_was_given():
    "A loader that takes only some of its items goes on doing so"
    dl = TfmdDL(list(range(1000)), bs=10, n=100)
    assert dl.with_bs(20).n==100

def test_loader_that_cannot_be_copied():
    "Its own error is in ours"
    class Mine(TfmdDL):
        def __init__(self, dataset, needed, **kwargs): super().__init__(dataset, **kwargs)
    with pytest.raises(ValueError, match="Mine.new can't make a copy.*needed"): Mine(list(range(10)), 1, bs=2).with_bs(4)

def test_batch_larger_than_the_data():
    "fastai would train on nothing without a word"
    dls = make_learner().dls
    with pytest.raises(ValueError, match='5,000 is more than the 1,437 items'): dls.with_bs(5000)

def test_small_validation_set():
    "It keeps a batch, where it can't fill one and drops what is left"
    dls = make_learner().dls
    assert [o.bs for o in dls.with_bs(1024).loaders]==[1024,360] and len(dls.with_bs(1024).valid)==1
    dls.valid.drop_last = False
    assert dls.with_bs(1024).valid.bs==1024

# --- loaders of other classes: what they were built with stays, or they say why it can't

class Sampled(TfmdDL):
    "Draws items by weights, an argument that `new` doesn't know"
    def __init__(self, dataset=None, bs=64, weights=None, **kwargs):
        super().__init__(dataset, bs=bs, **kwargs)
        self.weights = None if weights is None else np.array(weights)
    def get_idxs(self):
        if self.weights is None: return list(range(self.n))
        return np.random.choice(self.n, self.n, p=self.weights/self.weights.sum()).tolist()

class Grouped(TfmdDL):
    "Makes a plan from its batch size and its groups"
    def __init__(self, dataset=None, bs=64, groups=1, **kwargs):
        super().__init__(dataset, bs=bs, **kwargs)
        self.plan = [bs//groups]*groups

def rare(dl): return float(np.mean([i%10==0 for _ in range(5) for i in dl.get_idxs()]))

def sampled(**kwargs):
    ws = np.where(np.arange(500)%10==0, 9., 1.)
    return DataLoaders(Sampled(digits()[:500], bs=16, weights=ws, shuffle=True, **kwargs), TfmdDL(digits()[500:600], bs=16))

def test_weights_of_a_subclass_are_kept():
    "The rare class, a tenth of the items, makes up half of each epoch"
    set_seed(0)
    dls = sampled()
    assert abs(rare(dls.train)-.5) < .05 and abs(rare(dls.with_bs(32).train)-.5) < .05

def test_a_method_put_on_a_loader_is_kept():
    "Also one that belongs to the loader: the copy's goes to the copy"
    dls = sampled()
    dl = dls.train
    dl.mine = MethodType(lambda self: self.bs, dl)
    dl.tag = 'mine'
    res = dls.with_bs(32).train
    assert res.mine()==32 and dl.mine()==16 and res.tag=='mine'

def test_methods_put_on_a_loader_of_fastais_are_kept():
    "Weights of a sampler, and how a batch is made"
    dls = loaders(bs=16, n=500)
    dl = dls.train
    weights = np.where(np.arange(500)%10==0, 9., 1.)
    dl.get_idxs = MethodType(lambda self: np.random.choice(500, 500, p=weights/weights.sum()).tolist(), dl)
    dl.create_batch = MethodType(lambda self, b: (torch.full((len(b),), 7.),torch.zeros(len(b))), dl)
    dl.tag = 'mine'
    res = dls.with_bs(32).train
    set_seed(0)
    assert abs(rare(res)-.5) < .05 and res.tag=='mine' and res.bs==32
    assert next(iter(res))[0].tolist()==[7.]*32 and res.get_idxs.__self__ is res

def test_what_depends_on_both_is_refused():
    "A plan that its class made from batch size and groups can be neither copied nor made anew"
    dl = Grouped(digits()[:100], bs=16, groups=4)
    words = 'Grouped has plan, which depends on the batch size .* build your loaders'
    with pytest.raises(ValueError, match=words): dl.with_bs(32)
    assert Grouped(digits()[:100], bs=16).with_bs(32).plan==[32]

@pytest.mark.parametrize('call', [lambda o: o.bs_find(1e-3, bs=32, num_it=40, show_plot=False), lambda o: o.bs_profile(bss=[32])],
                         ids=['bs_find','bs_profile'])
def test_search_and_profile_copy_in_the_same_way(call):
    learn = make_learner()
    learn.dls = DataLoaders(Grouped(digits()[:100], bs=16, groups=4), Grouped(digits()[:100], bs=16), device='cpu')
    with pytest.raises(ValueError, match='Grouped has plan'): call(learn)
