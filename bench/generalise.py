"""Do large batches generalise worse? The network F1 of Keskar and others (arXiv 1609.04836) on 10,000 images of MNIST: batches
of 256 against a tenth of the training set, five seeds, Adam, trained until the loss stalls.

Then the remedies: as many steps as with 256 (arXiv 1705.08741), batch norm over 250 items ("ghost"), both; learning rates of a
factor of four around 1e-3, three seeds; and 15 epochs with a rate that falls to zero in the last quarter. All is kept in
`results/generalise/`, a study in each folder; remove a folder to make it again: an hour with `--jobs 2`. Seconds are not compared,
so other work may run beside it."""
from tasks import *

n_train,small,large,lr = 10_000,256,1_000,1e-3
rates = [lr/4,4*lr,16*lr]
FOLDER = RESULTS/'generalise'

class GhostNorm(nn.BatchNorm1d):
    "Batch norm whose statistics are those of 250 items"
    def forward(self, x):
        if not self.training: return super().forward(x)
        return torch.cat([super(GhostNorm, self).forward(o) for o in x.split(250)])

def f1(norm=nn.BatchNorm1d):
    "784 inputs, five hidden layers of 512 with batch norm and ReLU, 10 outputs"
    sizes = [784]+[512]*5
    hidden = [[nn.Linear(a, b),norm(b),nn.ReLU()] for a,b in zip(sizes, sizes[1:])]
    return nn.Sequential(nn.Flatten(), *sum(hidden, []), nn.Linear(512, 10))

def f1_learner(data, norm, bs):
    return Learner(mnist_part(data, n_train).with_bs(bs, val_bs=1000), f1(norm), CrossEntropyLossFlat(), opt_func=Adam, metrics=accuracy)

class Stall(Callback):
    "Ends a training when the mean loss of no epoch of the last five was below the least before by 0.001"
    def before_fit(self): self.least,self.since = math.inf,0
    def before_train(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.item())
    def after_epoch(self):
        fallen = np.mean(self.losses) < self.least-1e-3
        self.least,self.since = (np.mean(self.losses),0) if fallen else (self.least,self.since+1)
        if self.since >= 5: raise CancelFitException()

def until_it_stalls(learn, epochs, lr): learn.fit(epochs, lr, cbs=Stall())
def falling(learn, epochs, lr): learn.fit_flat_cos(epochs, lr)

def study(data, name, bs, lrs=(lr,), norm=nn.BatchNorm1d, epochs=200, fit=until_it_stalls, n_seeds=5, **kw):
    return bs_study(partial(f1_learner, data, norm), [bs], lrs, epochs=epochs, fit=fit, dynamics=True, n_seeds=n_seeds,
                    path=FOLDER/name, **kw)

def make(data, **kw):
    few = study(data, 'small', small, **kw)
    epochs = round(few.df.steps.median()/(n_train//large))
    study(data, 'large', large, **kw)
    study(data, 'large_ghost', large, norm=GhostNorm, **kw)
    study(data, 'large_steps', large, epochs=epochs, fit=Learner.fit, **kw)
    study(data, 'large_steps_ghost', large, norm=GhostNorm, epochs=epochs, fit=Learner.fit, **kw)
    for name,bs in dict(small=small, large=large).items():
        study(data, f'{name}_rates', bs, rates, n_seeds=3, **kw)
        study(data, f'{name}_falling', bs, epochs=15, fit=falling, **kw)

names = ('small','large','large_ghost','large_steps','large_steps_ghost','small_rates','large_rates','small_falling',
         'large_falling')

def load(name):
    "The trainings of a study; accuracy in per cent"
    df = Study.load(FOLDER/name).df
    return df.assign(study=name, accuracy=100*df.accuracy, best_accuracy=100*df.best_accuracy, epochs=df.examples/n_train)

def results(names=names):
    "A row for each study and rate: means over the seeds, with their standard deviations"
    return pd.concat(map(load, names)).groupby(['study','lr'], sort=False)[
        ['epochs','steps','accuracy','best_accuracy','train_loss','sharpness','hessian_max','distance']].agg(spread)

if __name__=='__main__':
    p = parser(__doc__, data=True, jobs=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    make(args.data, n_jobs=args.jobs, progress=False)
    table(results().reset_index().to_dict('records'))
