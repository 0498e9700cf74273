"""What does the batch size do to the path of the weights? MNIST, a small convnet, batches of 32 to 1,024.

`examples`: three epochs at a constant rate, as many examples at each size, at several rates; SGD and Adam.
`steps`: 300 steps at each size, at one rate.
`rescue`: four epochs, in which a batch of 1,024 becomes one of 32 after two of them, or the other way round, or the rate becomes
4 times as large or as small; beside trainings in which nothing changes.

10,240 training images, 10,000 of the test set for validation, three seeds. All is kept in `results/path/`, a study in each folder;
remove a folder to make it again: half an hour, less with `--jobs 2`. Seconds are not compared, so other work may run beside it."""
from tasks import *

bss,n_train = [32,64,128,256,512,1024],10_240
lrs = dict(sgd=[.02,.08,.32,1.28], adam=[5e-4,2e-3,8e-3,3.2e-2]) # the second is the one at which everything else is the same
opts = dict(sgd=SGD, adam=Adam)
FOLDER = RESULTS/'path'

def layers(model): return [params(o) for o in model if list(o.parameters())]

def path_learner(data, opt, bs):
    "A parameter group for each layer, so that the distance of each is recorded"
    return Learner(mnist_part(data, n_train).with_bs(bs, val_bs=1000), small_convnet(), CrossEntropyLossFlat(), opt_func=opts[opt],
                   metrics=accuracy, splitter=layers)

class StopTraining(Callback):
    "Ends the training of the last epoch after `n` steps of all; it is validated all the same"
    def __init__(self, n): self.left = n
    def after_step(self): self.left -= 1
    def after_batch(self):
        if self.training and self.left <= 0: raise CancelTrainException()

def steps_300(learn, epochs, lr): learn.fit(math.ceil(300/len(learn.dls.train)), lr, cbs=StopTraining(300))

def stays(learn, epochs, lr): learn.fit(4, lr)
def to_small_batches(learn, epochs, lr): learn.fit(4, lr, cbs=BatchSizeSchedule({0: 1024, 2: 32}, max_bs=1024))
def to_large_batches(learn, epochs, lr): learn.fit(4, lr, cbs=BatchSizeSchedule({0: 32, 2: 1024}, max_bs=1024))
def to_a_rate(learn, lr, times):
    for o in (lr,times*lr): learn.fit(2, o)
def to_a_larger_rate(learn, epochs, lr): to_a_rate(learn, lr, 4)
def to_a_smaller_rate(learn, epochs, lr): to_a_rate(learn, lr, 1/4)

rescues = {1024: (stays,to_small_batches,to_a_larger_rate), 32: (stays,to_large_batches,to_a_smaller_rate)}

def fates(): return [(opt,bs,fit) for opt in opts for bs,fits in rescues.items() for fit in fits]

def study(data, opt, bss, lrs, *path, **kw):
    return bs_study(partial(path_learner, data, opt), bss, lrs, epochs=3, dynamics=True, path=FOLDER.joinpath(*path), **kw)

def make(data, **kw):
    for opt,o in lrs.items():
        study(data, opt, bss, o, opt, 'examples', fit=Learner.fit, **kw)
        study(data, opt, bss, o[1:2], opt, 'steps', fit=steps_300, **kw)
    for opt,bs,fit in fates(): study(data, opt, [bs], lrs[opt][1:2], 'rescue', f'{opt}_{bs}_{fit.__name__}', fit=fit, **kw)

def load(*path): return Study.load(FOLDER.joinpath(*path))

if __name__=='__main__':
    p = parser(__doc__, data=True, seeds=3, jobs=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    make(args.data, n_seeds=args.seeds, n_jobs=args.jobs, progress=False)
    columns = ['bs','lr','accuracy','train_loss','distance','grad_norm','grad_norm_std','sharpness']
    for opt in lrs:
        print(f'## {opt}: the best rate at each batch size\n')
        table(load(opt, 'examples').best().reset_index()[columns].to_dict('records'))
