"""Does a batch that grows beat the curve of constant ones? On tasks of the proof (`tasks.py`), but longer, with `fit_one_cycle`.
First batch sizes that stay, each with the best of several peaks of the learning rate, with one that is no better on either
side. Then batches that begin with the smallest of them and grow by several rules, with the best peak of the size that they begin
with and twice that. `flat` ones keep the rate at its peak after the warm-up (or at half of it), so that the batch grows instead
of the annealing. The recipe is what `bs_find()` has said for the proof, medians of its calls.

`steps/curve` is the number of optimizer steps over that at which the curve of constant sizes has the same validation loss (1: on
the curve, below 1: better; beyond an end of the curve, that end counts), `loss/curve` the loss over that of the curve at as many
steps, and `±` its standard error. `power` is that of the batch size with which the rate grows.

What was trained is kept in `results/growth.csv`; remove lines to train them again. `--jobs` makes several trainings at a time, of
one thread each; the column of seconds is then worth little."""
from proof import *
from joblib import Parallel, delayed
from fastai.callback.schedule import SchedCos, SchedNo, combine_scheds
from fastai_bs_finder.monitor import NoiseScaleMonitor
from fastai_bs_finder.schedule import BatchSizeSchedule

class Plan(NamedTuple):
    epochs:int
    bss:list # That stay; batches that grow begin with the first
    peaks:list # Of the learning rate

plans = {
    'MNIST, Adam': Plan(4, [64,128,256,512], [.008,.016,.032]),
    'CIFAR, Adam': Plan(3, [64,128,256,512], [.008,.016,.032]),
    'Flights, Adam': Plan(2, [512,1024,2048,4096], [.016,.032,.064]),
    'Republic, Adam': Plan(2, [32,64,128,256], [.008,.016,.032]),
    'Adult, Adam': Plan(4, [128,256,512,1024], [.016,.032,.064])}

class Run(NamedTuple):
    task:str
    rule:str # '': the batch stays, as it does with the recipe
    power:float # of the batch size, with which the rate grows
    bs:int # at first
    peak:float
    seed:int

def cosine(pct, start=.25):
    "How much of its peak the rate of `fit_one_cycle` has after the warm-up"
    return 1. if pct < start else (1+math.cos(math.pi*(pct-start)/(1-start)))/2

def at(pct, times): return lambda bs: lambda p: bs*(times if p >= pct else 1)
def quarters(bs): return lambda p: bs*2**min(3, int(4*p))
def seesaw(bs): return lambda p: bs*min(8, 1/max(1e-9, cosine(p))) # arXiv 2510.14717, and 1711.00489 where the rate stays

class AsNoise:
    "Twice the batch for twice the noise scale that a monitor had after a tenth of the training (arXiv 2505.23971)"
    def __init__(self, bs): self.bs,self.times,self.first,self.monitor = bs,1,None,NoiseScaleMonitor(every=8)
    def __call__(self, pct):
        now = self.monitor.last('noise_scale')
        if pct < .1 or not 0 < now < math.inf: return self.bs
        self.first = self.first or now
        while self.times < 8 and now >= 2*self.times*self.first: self.times *= 2
        return self.bs*self.times

rules = {'x4 at 3/4': at(.75, 4), 'x8 at 1/2': at(.5, 8), 'x2 each quarter, to x8': quarters, 'as the rate falls, to x8': seesaw,
         'as the noise scale grows, to x8': AsNoise}
flat = {'flat, x2 each quarter, to x8': quarters, 'flat, as it would fall, to x8': seesaw}

class Clock(Callback):
    "Steps and seconds of a training, without its validation"
    run_valid = False
    def before_fit(self): self.n_steps,self.seconds = 0,0.
    def before_train(self): self.start = time.perf_counter()
    def after_step(self): self.n_steps += 1
    def after_train(self): self.seconds += time.perf_counter()-self.start

def train(run, data):
    "Make a run: its validation loss, steps and seconds"
    learn,clock,epochs = new_learner(run.task, data, run.seed),Clock(),plans[run.task].epochs
    learn.dls = learn.dls.with_bs(run.bs, val_bs=512)
    learn.dls.train.rng = random.Random(run.seed)
    cbs = [clock]
    if run.rule in rules|flat:
        sched = (rules|flat)[run.rule](run.bs)
        cbs += [BatchSizeSchedule(sched, lr_power=run.power), *L(getattr(sched, 'monitor', None))]
    with learn.no_logging():
        if run.rule not in flat: learn.fit_one_cycle(epochs, run.peak, cbs=cbs)
        else:
            lr = combine_scheds([.25,.75], [SchedCos(run.peak/25, run.peak), SchedNo(run.peak, run.peak)])
            learn.fit(epochs, run.peak, cbs=[*cbs, ParamScheduler({'lr': lr})])
    return run._asdict() | dict(epochs=epochs, loss=learn.recorder.values[-1][1], steps=clock.n_steps, seconds=clock.seconds)

path = RESULTS/'growth.csv'
def kept_runs(): return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*Run._fields])

def made(runs, data, n_jobs):
    "Make those that are missing, several at a time"
    df = kept_runs().fillna({'rule':''})
    there = {Run(*o) for o in df[[*Run._fields]].itertuples(index=False)}
    todo = [o for o in runs if o not in there]
    for row in Parallel(n_jobs=n_jobs, return_as='generator_unordered')(delayed(train)(o, data) for o in todo):
        df = pd.concat([df, pd.DataFrame([row])], ignore_index=True) if len(df) else pd.DataFrame([row])
        df.sort_values([*Run._fields]).to_csv(path, index=False, float_format='%.6g')

def constants(task, n_seeds):
    return [Run(task, '', 0., bs, lr, s) for bs in plans[task].bss for lr in plans[task].peaks for s in range(n_seeds)]

def beyond(task, n_seeds):
    "The next peak for each batch size whose best one is at an end of those that were tried"
    df = kept_runs()
    means = df[(df.task==task) & df.rule.isna()].groupby(['bs','peak']).loss.mean()
    def next_peaks(losses):
        best,tried = losses.idxmin(),losses.index
        return [o for o,end in ((best*2,max(tried)), (best/2,min(tried))) if best==end]
    return [Run(task, '', 0., int(bs), float(lr), s) for bs,o in means.groupby('bs')
            for lr in next_peaks(o.droplevel('bs')) for s in range(n_seeds)]

def curve_of(task):
    "Of the batch sizes that stay, what the best peak has come to"
    df = kept_runs()
    df = df[(df.task==task) & df.rule.isna()]
    res = df.groupby(['bs','peak']).agg(loss=('loss','mean'), spread=('loss','std'), steps=('steps','mean')).reset_index()
    return res.loc[res.groupby('bs').loss.idxmin()].set_index('bs')

def growing(task, n_seeds):
    bs = plans[task].bss[0]
    best,recipe = float(curve_of(task).peak[bs]),kept('proof_recipe', task, 0, None)[['fastest','lr']].median()
    said = int(2**round(math.log2(recipe.fastest))),float(f'{recipe.lr:.3g}')
    def runs(rule, power, factors): return [Run(task, rule, power, bs, best*f, s) for f in factors for s in range(n_seeds)]
    asked = [Run(task, 'the recipe', 0., *said, s) for s in range(n_seeds)]
    return asked + [r for o in rules for p in (0.,.5) for r in runs(o, p, (1,2))] + [r for o in flat for r in runs(o, 0., (.5,1))]

def beside_curve(curve, loss, steps):
    "Steps and loss over those of the curve"
    c = curve.sort_values('steps')
    c = c[c.loss < c.loss.cummin().shift(fill_value=math.inf)] # more steps, and no better: not a part of it
    x,y = np.log(c.steps.to_numpy()),np.log(c.loss.to_numpy())
    same_loss,same_steps = np.interp(-math.log(loss), -y, x),np.interp(math.log(steps), x, y)
    return steps/np.exp(same_loss),loss/np.exp(same_steps)

def report(task):
    "Rows: the curve, and beside it the recipe and the batches that grow"
    df,curve = kept_runs(),curve_of(task)
    rows = [{'task':task, 'rule':f'{bs} throughout', 'power':0.} | o.to_dict() for bs,o in curve.iterrows()]
    df = df[(df.task==task) & df.rule.notna()]
    for (rule,power),o in df.groupby(['rule','power'], sort=False):
        losses = {peak: x.loss for peak,x in o.groupby('peak')}
        peak = min(losses, key=lambda k: losses[k].mean())
        loss,spread,steps = losses[peak].mean(),losses[peak].std(),o[o.peak==peak].steps.mean()
        a,b = beside_curve(curve, loss, steps)
        chance = math.hypot(spread/loss, (curve.spread/curve.loss).mean())/len(losses[peak])**.5
        rows.append({'task':task, 'rule':rule, 'power':power, 'peak':peak, 'loss':loss, 'spread':spread, 'steps':steps,
                     'steps/curve':a, 'loss/curve':b, '±':chance})
    return rows

def picture(res):
    "For each task the loss over the steps: the curve, and what is beside it"
    fig,axs = plt.subplots(2, 3, figsize=(11,7), layout='constrained')
    for ax,(task,rows) in zip(axs.flat, res.items()):
        df = pd.DataFrame(rows)
        ax.plot(*df[df.rule.str.contains('throughout')][['steps','loss']].T.to_numpy(), 'o-', color='C7', label='the batch stays')
        for i,(rule,o) in enumerate(df[~df.rule.str.contains('throughout')].groupby('rule', sort=False)):
            ax.errorbar(o.steps, o.loss, o.spread/3**.5, fmt='osDv^<>*'[i], ms=5, color=f'C{i}', label=rule)
        ax.set(title=task, xlabel='Steps', ylabel='Validation loss')
        log2_axis(ax.xaxis)
    for ax in axs.flat[len(res):]: ax.axis('off')
    axs.flat[-1].legend(*axs.flat[0].get_legend_handles_labels(), loc='center', frameon=False)
    return fig

def main():
    p = parser(__doc__, data=True, seeds=3, jobs=1)
    p.add_argument('--task', choices=plans, action='append', help='only this one')
    args = p.parse_args()
    chosen = args.task or [*plans]
    for runs in (constants,*[beyond]*3,growing): made([r for o in chosen for r in runs(o, args.seeds)], args.data, args.jobs)
    for o in chosen: table(report(o))

if __name__=='__main__': main()
