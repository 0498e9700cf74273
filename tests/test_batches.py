"Batches of every size: short ones, varying ones, samplers."
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from helpers import digits
from measuring import assert_close, drowned_is_fine, each_method_in_ci, exact, learner, measure

pytestmark = drowned_is_fine

@each_method_in_ci
def test_last_partial_batch(method):
    "15 batches of 8 and one of 3"
    learn = learner(items=digits()[:123], drop_last=False)
    assert_close(measure(learn, method), exact(learn))

@each_method_in_ci
def test_windows_that_end_anywhere_in_an_epoch(method):
    "14 batches of 8 and one of 3: the small one comes at any place of a window, first too"
    learn = learner(items=digits()[:115], drop_last=False)
    assert_close(measure(learn, method, num_it=480), exact(learn))

class Sizes(DataLoader):
    "Batches of 4, 12, 4, 12, ..."
    def __len__(self): return 2*(self.n//16) if self.bs>1 else self.n
    def chunkify(self, b):
        if self.bs==1: return super().chunkify(b)
        b = list(b)
        return [b[i+a:i+c] for i in range(0, len(b), 16) for a,c in ((0,4),(4,16))]

@each_method_in_ci
def test_loader_with_varying_batches(method):
    learn = learner()
    learn.dls.loaders[0] = Sizes(learn.dls.train.dataset, bs=8, shuffle=True, num_workers=0, device='cpu')
    assert [len(y) for _,y in learn.dls.train]==[4,12]*8==[4,12]*(len(learn.dls.train)//2)
    assert_close(measure(learn, method), exact(learn))

class BatchSampler:
    "Orders of all indices, cut into pieces of various sizes"
    sizes = [2,14,6,10]*4
    def __len__(self): return len(self.sizes)
    def __iter__(self): return iter([o.tolist() for o in torch.randperm(128).split(self.sizes)])

@each_method_in_ci
def test_batch_sampler(method):
    "PyTorch's own loader, with batches as a sampler makes them"
    learn = learner()
    dl = torch.utils.data.DataLoader(digits()[:128], batch_sampler=BatchSampler())
    learn.dls = DataLoaders(dl, dl, device='cpu')
    learn.dls._device = torch.device('cpu')
    assert [len(y) for _,y in learn.dls.train]==BatchSampler.sizes
    assert_close(measure(learn, method), exact(learn))
