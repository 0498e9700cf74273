"""Does it hold when one really trains? Four tasks, each trained at batch sizes 8 to 4,096 until a validation loss that
is fixed beforehand.

The sweep: at every batch size the learning rate, constant through a run, is tuned on a grid of factors of two: from
the best one of the neighbouring size on, upwards or downwards, until it gets worse; `--seeds` times. A run ends when
the mean of its last three validation losses is at the target, when it diverges, and when it can't win any more: after
1.5 times the steps of the best so far at its batch size and seed, after twice what the neighbouring size lets expect,
or after 40 seconds of training, which ends the batch size too. Seconds are steps times the time of a step, which is
measured apart, without validations: at all sizes one after the other, three times (the seconds that the runs
themselves took are kept too, but short runs spend a part of them on starting).

The prediction: `lr_find` once on a learner with batches of 64, and `bs_find` with the learning rate that it suggests.
Then the task is trained with batches of `fastest`, and the learning rate that `scale_lr` makes of lr_find's; and with
batches of 64 and lr_find's own. That is done for two of lr_find's suggestions: `valley`, its default, and `minimum`,
a tenth of the rate at which its loss is least.

What is finished is kept in `results/proof_runs.csv`, `proof_steps.csv` and `proof_find.csv`, and is not repeated;
`--fresh` repeats them. The picture is `nbs/images/proof.png`. Let nothing else run."""
from tracking import *
import functools, matplotlib.pyplot as plt
from fastai.callback.schedule import minimum, valley
from fastai_bs_finder.recorder import log2_axis
from scipy.optimize import least_squares

suggestions = dict(valley=valley, minimum=minimum) # of lr_find
up,down = [2**i for i in range(6,13)],[32,16,8]
max_seconds,patience = 40,1.5

def tensor_dls(xs, ys, n_valid):
    "Loaders over two tensors, the last `n_valid` items for validation"
    items = list(zip(xs, ys))
    return DataLoaders.from_dsets(
        items[:-n_valid], items[-n_valid:], bs=64, num_workers=0, shuffle=True, drop_last=True, device='cpu')

def mnist_dls(data): return tensor_dls(*mnist_tensors(data), 3000)
def adult_dls(data): return adult(data).dls
def republic_dls(data):
    learn = small_republic(data)
    dls = tensor_dls(*all_items(learn.dls.train), 1000)
    dls.n_vocab = learn.model.head.out_features
    return dls

def classifier(dls, opt_func): return Learner(dls, small_convnet(), CrossEntropyLossFlat(), opt_func=opt_func)

# loaders, learner for them, validation loss to reach, learning rate to begin the sweep with at a batch size of 64
tasks = {
    'MNIST, SGD': (mnist_dls, partial(classifier, opt_func=SGD), .1, .2),
    'MNIST, Adam': (mnist_dls, partial(classifier, opt_func=Adam), .1, 4e-3),
    'Adult, Adam': (adult_dls, lambda dls: tabular_learner(dls, layers=[200,100]), .355, 2e-3),
    'Republic, Adam': (republic_dls, lambda dls: Learner(dls, TinyLM(dls.n_vocab, 32, 32), CrossEntropyLossFlat()), 2., 8e-3)}

@functools.cache
def loaders(task, data): return tasks[task][0](data)

def learner(task, data, bs, seed):
    set_seed(seed)
    dls = loaders(task, data).with_bs(bs, val_bs=1000)
    dls.train.rng = random.Random(seed)
    return tasks[task][1](dls).remove_cb(ProgressCallback)

class ToTarget(Callback):
    "Train until the validation loss is `target`, or `max_steps` are over; the clock stands still during validations"
    order = 1000
    def __init__(self, valid, target, max_steps): self.valid,self.target,self.max_steps = valid,target,max_steps
    def before_fit(self):
        self.steps,self.seconds,self.next,self.reached,self.losses,self.start = 0,0.,1,False,[],time.perf_counter()
    def after_batch(self):
        self.steps += 1
        if self.steps < self.next: return
        self.seconds += time.perf_counter()-self.start
        loss = self.loss_of_valid()
        self.losses.append(loss)
        self.reached = len(self.losses) > 2 and np.mean(self.losses[-3:]) <= self.target
        if self.reached or not loss < 2*self.losses[0] or self.steps >= self.max_steps or self.seconds > max_seconds: raise CancelFitException()
        self.next = math.ceil(1.05*self.steps)+1
        self.start = time.perf_counter()
    def loss_of_valid(self):
        *xb,y = self.valid
        self.model.eval()
        with torch.no_grad(): res = float(np.mean([self.learn.loss_func(self.model(*(x[i:i+1000] for x in xb)), y[i:i+1000]).item() for i in range(0, len(y), 1000)]))
        self.model.train()
        return res
    def before_validate(self): raise CancelValidException()

def train(task, data, bs, lr, seed, max_steps=math.inf):
    "One run, as a row"
    learn = learner(task, data, bs, seed)
    cb = ToTarget(all_items(loaders(task, data).valid), tasks[task][2], max_steps)
    with learn.no_logging(): learn.fit(10_000, lr, cbs=cb)
    return dict(steps=cb.steps, seconds=cb.seconds, reached=cb.reached)

class Kept:
    "Rows that were computed once, on disk"
    def __init__(self, path, fresh): self.path,self.df = path,pd.read_csv(path) if path.exists() and not fresh else pd.DataFrame()
    def get(self, known, compute):
        "The row that agrees with `known`, computed if there is none yet"
        for _,o in self.df.iterrows():
            if all(o[k]==v if isinstance(v, str) else math.isclose(o[k], v, rel_tol=1e-3) for k,v in known.items()): return o
        self.df = pd.concat([self.df, pd.DataFrame([known | compute()])], ignore_index=True)
        self.df.to_csv(self.path, index=False, float_format='%.6g')
        return self.df.iloc[-1]

class Runs(Kept):
    def get(self, task, bs, lr, seed, run, ours=False):
        "The run of these settings; `ours` are those that were predicted, and no part of the sweep"
        def told():
            row = run()
            print(
                f"{task}, bs {bs}, lr {lr:.3g}, seed {seed}: {row['steps']} steps, {row['seconds']:.1f} s" + ('' if row['reached'] else ', given up'),
                file=sys.stderr, flush=True)
            return row
        return super().get(dict(task=task, bs=bs, lr=lr, seed=seed, ours=ours), told)

class TooLong(Exception): pass

def climb(runs, task, data, bs, lr, seed, most):
    "Tune the learning rate on a grid of factors of two, from `lr` on, each within `most` steps: the best one and its steps, or None"
    found = {}
    def steps(lr):
        r = runs.get(
            task, bs, lr, seed,
            lambda: train(task, data, bs, lr, seed, min(most, patience*min(found.values(), default=math.inf))))
        found[lr] = r.steps if r.reached else math.inf
        if not r.reached and r.seconds > max_seconds: raise TooLong
        return found[lr]
    for factor in (.5,2) if math.isinf(steps(lr)) else (2,.5): # what fails is more often too high than too low
        at = lr
        for _ in range(3 if math.isinf(found[lr]) else 6):
            at *= factor
            if steps(at) > found[at/factor] or (math.isinf(found[at]) and not math.isinf(min(found.values()))): break
        if min(found, key=found.get)!=lr: break # it is better on this side, so it is not on the other
    best = min(found, key=found.get)
    return None if math.isinf(found[best]) else (best,found[best])

def sweep(runs, task, data, seeds):
    middle = tasks[task][3],math.inf
    for sizes in (up,down):
        lr,most = middle
        for bs in sizes:
            best = []
            for seed in range(seeds):
                try: res = climb(runs, task, data, bs, lr, seed, 2*most*(2 if sizes is down else 1)) # larger batches don't need more steps, nor smaller ones more examples
                except TooLong: res = None
                if res is None: break
                lr = res[0]
                best.append(res[1])
            if res is None: break # and so it would be from here on
            most = np.median(best)
            if bs==64: middle = lr,most

class Clock(Callback):
    "Seconds of a training step: the mean over half a second and three steps at the least, after three that don't count"
    order = 1000
    def before_fit(self): self.n = 0
    def after_batch(self):
        self.n += 1
        if self.n==3: self.start = time.perf_counter()
        self.seconds = (time.perf_counter()-self.start)/(self.n-3) if self.n > 3 else math.inf
        if self.n >= 6 and self.seconds*(self.n-3) > .5: raise CancelFitException()
    def before_validate(self): raise CancelValidException()

def time_of_step(task, data, bs):
    learn,clock = learner(task, data, bs, 0),Clock()
    with learn.no_logging(): learn.fit(10_000, 1e-6, cbs=clock)
    return dict(step=clock.seconds)

def curve(df, step):
    "Of the runs of a task, for each batch size: the learning rate that does best over all seeds, and what it takes"
    rows = []
    for bs,o in df.groupby('bs'):
        o = o.assign(steps=o.steps.where(o.reached.astype(bool), math.inf))
        o = o.groupby('lr').filter(lambda g: g.seed.nunique()==o.seed.nunique())
        med = o.groupby('lr').steps.median()
        if np.isfinite(med.min()): rows.append(dict(bs=int(bs), lr=med.idxmin(), steps=med.min(), examples=bs*med.min(), step=step[bs], seconds=step[bs]*med.min()))
    return pd.DataFrame(rows).set_index('bs')

def critical_of(df):
    "Least steps and critical batch size of the curve `steps = least*(1 + critical/bs)`, by relative deviations"
    def fit(o): return np.exp(o[0])*(1+np.exp(o[1])/df.index)
    o = least_squares(lambda o: np.log(fit(o)/df.steps), [math.log(df.steps.min()), math.log(100)], loss='soft_l1', f_scale=.1).x
    return float(np.exp(o[0])),float(np.exp(o[1]))

def find(task, data, suggestion):
    "What `lr_find` and, with its learning rate, `bs_find` say at a batch size of 64, and how long they take"
    learn = learner(task, data, 64, 0)
    with tempfile.TemporaryDirectory() as tmp:
        learn.path = Path(tmp)
        start = time.perf_counter()
        lr = learn.lr_find(show_plot=False, suggest_funcs=suggestions[suggestion])[0]
        mid = time.perf_counter()
        sugg = learn.bs_find(
            lr, show_plot=False, suggest_funcs=(BSSuggestion.Fastest,BSSuggestion.Critical,BSSuggestion.Efficient))
        end = time.perf_counter()
    row = learn.recorder.settled()
    new = scale_lr(lr, 64, sugg.fastest, noise_scale=row.noise_scale, opt=learn.opt_func)
    fit = learn.recorder.profile.step_time
    return dict(
        lr_find=lr, noise_scale=row.noise_scale, lower=row.lower, upper=row.upper, **sugg._asdict(), lr=new,
        overhead=fit.overhead, per_item=fit.per_item, error=fit.error, lr_find_seconds=mid-start,
        bs_find_seconds=end-mid)

def median_steps(df, task): return df[df.task==task].groupby('bs').step.median()

def compare(task, df, step, f):
    "The sweep of a task as a table, and a row that has the prediction `f` beside it; `step` has the seconds of a step by batch size"
    is_ours = df.ours.astype(bool)
    ours,swept = df[is_ours],df[~is_ours]
    grid,swept_seconds = curve(swept, step),swept.seconds.sum()
    def seconds(bs, lr):
        o = ours[(ours.bs==bs) & np.isclose(ours.lr, lr, rtol=1e-3)]
        return step[bs]*o.steps.median() if o.reached.all() else math.inf
    fastest,best,(least,critical) = int(f.fastest),grid.seconds.idxmin(),critical_of(grid)
    at_fastest,at_64 = seconds(fastest, f.lr),seconds(64, f.lr_find)
    row = {
        'task':task, 'lr_find':f.suggestion, 'noise scale':f'{f.noise_scale:,.0f} ({f.lower:,.0f} to {f.upper:,.0f})',
        'critical':int(f.critical), 'fitted':critical, 'fastest':fastest, 'best':int(best),
        's at best':grid.seconds[best], 's at fastest':at_fastest, 's at 64':at_64,
        'fastest/best':at_fastest/grid.seconds[best], 'fastest/64':at_fastest/at_64,
        'fastest/best, both tuned':grid.seconds[fastest]/grid.seconds[best],
        'lr at 64, fastest':f"{f.lr_find:.2g}, {f.lr:.2g}", 'tuned':f"{grid.lr[64]:.2g}, {grid.lr[fastest]:.2g}",
        'bs_find (s)':f.bs_find_seconds, 'sweep (s)':swept_seconds, 'sweep/bs_find':swept_seconds/f.bs_find_seconds}
    return grid.assign(predicted=grid.step*(1+f.noise_scale/grid.index)),least,row

def picture(res):
    "For each task the measured steps and seconds over the batch size, and what was predicted; `res` has what `compare` returns"
    fig,axs = plt.subplots(2, len(res), figsize=(4*len(res),7.5), layout='constrained', squeeze=False)
    for (top,bottom),(task,(grid,least,row)) in zip(axs.T, res.items()):
        bs = np.geomspace(grid.index[0], grid.index[-1], 100)
        top.plot(grid.index, grid.steps, 'o', label='trained, learning rate tuned')
        top.plot(bs, least*(1+row['fitted']/bs), color='C0', lw=1, label='curve fitted to it')
        top.axvline(row['critical'], color='C3', ls='--', label='suggested: `critical` above, `fastest` below')
        top.set(title=f"{task}\ncritical: {row['critical']:,} suggested, {row['fitted']:,.0f} fitted", ylabel='Steps')
        bottom.plot(grid.index, grid.seconds, 'o')
        predicted = grid.predicted*grid.seconds.min()/grid.predicted.min()
        bottom.plot(grid.index, predicted, color='C1', lw=1, label='predicted form')
        bottom.plot([row['fastest'],64], [row['s at fastest'],row['s at 64']], 'x', color='C3', ms=9,
                    label=f"trained at `fastest` and 64, learning rate by `{row['lr_find']}`")
        bottom.axvline(row['fastest'], color='C3', ls='--')
        bottom.set(title=f"fastest: {row['fastest']:,} suggested, {row['best']:,} found", xlabel='Batch size', ylabel='Seconds')
        for ax in (top,bottom):
            log2_axis(ax.xaxis)
            log2_axis(ax.yaxis)
    handles = [h for ax in axs[:,0] for h in ax.get_legend_handles_labels()[0]]
    fig.legend(handles, [h.get_label() for h in handles], loc='outside upper center', ncols=3, frameon=False)
    return fig

def main():
    p = parser(__doc__, data=True, seeds=3)
    p.add_argument('--task', choices=tasks, help='only this one')
    p.add_argument('--fresh', action='store_true', help='repeat finished runs')
    args = p.parse_args()
    runs,res = Runs(RESULTS/'proof_runs.csv', args.fresh),{}
    steps,found = (Kept(RESULTS/f'proof_{o}.csv', args.fresh) for o in ('steps','find'))
    for task in [o for o in tasks if args.task in (None,o)]:
        fs = [found.get(dict(task=task, suggestion=o), lambda: find(task, args.data, o)) for o in suggestions]
        sweep(runs, task, args.data, args.seeds)
        for f,seed in itertools.product(fs, range(args.seeds)):
            for bs,lr in ((64,float(f.lr_find)), (int(f.fastest),float(f.lr))): runs.get(task, bs, lr, seed, lambda: train(task, args.data, bs, lr, seed), ours=True)
        for i,bs in itertools.product(range(3), down[::-1]+up): steps.get(dict(task=task, bs=bs, round=i), lambda: time_of_step(task, args.data, bs))
        for f in fs: res[task,f.suggestion] = compare(task, runs.df[runs.df.task==task], median_steps(steps.df, task), f)
        print(f"## {task}: validation loss {tasks[task][2]}\n")
        table(res[task,'minimum'][0].reset_index().to_dict('records'))
    print("## Prediction and proof\n")
    table([o[-1] for o in res.values()])
    picture({k:v for (k,o),v in res.items() if o=='valley'}).savefig(Path(__file__).parents[1]/'nbs'/'images'/'proof.png', dpi=80)

if __name__=='__main__': main()
