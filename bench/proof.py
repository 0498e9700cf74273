"""Does it hold when one really trains? Six tasks (`tasks.py`), each trained by `bs_study` at many batch sizes to a
validation loss that is fixed beforehand.

The sweep: at every batch size the learning rate, constant through a run, is tuned on a grid of factors of two, with
`--seeds` seeds. Steps to the target are compared, so it may run beside other work; `--jobs 2` makes two runs at a time.

The speed: seconds of a step, measured apart, in half a second of training and six steps at least, three times. The
time to the target is steps times that.

The prediction: `lr_find` once on a learner with batches of 64, and `bs_find` with the learning rate that it suggests.
Then the task is trained with batches of `fastest`, and the learning rate that `scale_lr` makes of lr_find's; and with
batches of 64 and lr_find's own. That is done for two of lr_find's suggestions: `valley`, its default, and `minimum`,
a tenth of the rate at which its loss is least.

All is kept in `results/proof/`, a study in each folder, and `results/proof_find.csv`, and is not repeated: remove a
folder to repeat it. The sweep of a task takes under an hour, the rest a few minutes; let nothing else run beside that.
Many runs of the first four tasks were made by an older program and converted: of them only steps are known, and
`steps_to_target` is the middle of the two looks between which it lies. The picture is `nbs/images/proof.png`."""
from tasks import *
from fastai.callback.schedule import minimum, valley
from fastai_bs_finder.recorder import log2_axis
import matplotlib.pyplot as plt

suggestions = dict(valley=valley, minimum=minimum) # of lr_find

def folder(task, what): return RESULTS/'proof'/task.lower().replace(', ', '_')/what

def study(task, data, what, bss, **kw):
    "Trainings to the target of a task"
    t = tasks[task]
    return bs_study(
        partial(learner, task, data), bss, target=t.target, max_examples=t.max_examples, path=folder(task, what), **kw)

class Enough(Callback):
    "Ends the training of an epoch after half a second"
    def before_train(self): self.start = time.perf_counter()
    def after_batch(self):
        if self.training and self.iter >= 5 and time.perf_counter()-self.start > .5: raise CancelTrainException()

def half_a_second(learn, epochs, lr): learn.fit(epochs, lr, cbs=Enough())

def speed(task, data, bss):
    "Courses of half a second, which say how long a step takes at each batch size"
    return bs_study(
        partial(learner, task, data), bss, [1e-6], epochs=1, fit=half_a_second, path=folder(task, 'speed'))

def find(task, data, suggestion):
    "What `lr_find` and, with its learning rate, `bs_find` say at a batch size of 64, and how long they take"
    set_seed(0)
    learn = learner(task, data, 64).remove_cb(ProgressCallback)
    learn.dls.train.rng = random.Random(0)
    with tempfile.TemporaryDirectory() as tmp:
        learn.path = Path(tmp)
        start = time.perf_counter()
        lr = learn.lr_find(show_plot=False, suggest_funcs=suggestions[suggestion])[0]
        mid = time.perf_counter()
        sugg = learn.bs_find(
            lr, show_plot=False, suggest_funcs=(BSSuggestion.Fastest,BSSuggestion.Critical,BSSuggestion.Efficient))
        end = time.perf_counter()
    row = learn.recorder.settled()
    fit = learn.recorder.profile.step_time
    return dict(
        task=task, suggestion=suggestion, lr_find=lr, noise_scale=row.noise_scale, lower=row.lower, upper=row.upper,
        **sugg._asdict(), lr=scale_lr(lr, 64, sugg.fastest, noise_scale=row.noise_scale, opt=learn.opt_func),
        overhead=fit.overhead, per_item=fit.per_item, error=fit.error, lr_find_seconds=mid-start, bs_find_seconds=end-mid)

def found(task, data):
    "Rows of `find`, computed if they are not kept yet"
    path = RESULTS/'proof_find.csv'
    df = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=['task','suggestion'])
    missing = [o for o in suggestions if not ((df.task==task) & (df.suggestion==o)).any()]
    if missing:
        df = pd.concat([df, pd.DataFrame([find(task, data, o) for o in missing])], ignore_index=True)
        df.to_csv(path, index=False, float_format='%.6g')
        df = pd.read_csv(path) # as it will be read the next time
    return df[df.task==task]

def predicted(task, data, fs, n_seeds):
    "Trainings as predicted: at 64 and at `fastest`, with the learning rates that belong to them"
    for f in fs.itertuples():
        lrs = {64: [f.lr_find], int(f.fastest): [f.lr]}
        res = study(task, data, 'predicted', list(lrs), lrs=lrs, n_seeds=n_seeds)
    return res

def loaded(task): return tuple(Study.load(folder(task, o)) for o in ('sweep','speed','predicted'))

def compare(task, f, sweep, speed, predicted):
    "The sweep of a task as a table, and a row that has the prediction `f` beside it"
    step,fit = speed.df.groupby('bs').step_time.median(),sweep.critical()
    grid = sweep.best()[['lr','steps_to_target','edge']].assign(step=step)
    grid['examples'],grid['seconds'] = grid.index*grid.steps_to_target,grid.step*grid.steps_to_target
    grid['predicted'] = grid.step*(1+f.noise_scale/grid.index)
    def seconds(bs, lr):
        failed,steps = predicted.rank([o for o in predicted.rows if o['bs']==bs and math.isclose(o['lr'], lr, rel_tol=1e-6)])
        return math.inf if failed else step[bs]*steps
    fastest,best = int(f.fastest),grid.seconds.idxmin()
    at_fastest,at_64,cost = seconds(fastest, f.lr),seconds(64, f.lr_find),float((sweep.df.steps*sweep.df.bs.map(step)).sum())
    return grid,fit,{
        'task':task, 'lr_find':f.suggestion, 'noise scale':f'{f.noise_scale:,.0f} ({f.lower:,.0f} to {f.upper:,.0f})',
        'critical':int(f.critical), 'fitted':fit.critical, 'interval':f'{fit.lower:,.0f} to {fit.upper:,.0f}',
        'fitted/critical':fit.critical/f.critical, 'fastest':fastest, 'best':int(best),
        's at best':grid.seconds[best], 's at fastest':at_fastest, 's at 64':at_64,
        'fastest/best':at_fastest/grid.seconds[best], 'fastest/64':at_fastest/at_64,
        'fastest/best, both tuned':grid.seconds.get(fastest, math.inf)/grid.seconds[best],
        'lr at 64, fastest':f"{f.lr_find:.2g}, {f.lr:.2g}", 'tuned':f"{grid.lr[64]:.2g}, {grid.lr.get(fastest, math.nan):.2g}",
        'bs_find (s)':f.bs_find_seconds, 'sweep (s)':cost, 'sweep/bs_find':cost/f.bs_find_seconds}

def picture(res):
    "For each task the steps and seconds over the batch size, and what was predicted; `res` has what `compare` returns"
    fig,axs = plt.subplots(len(res), 2, figsize=(10,3.2*len(res)), layout='constrained', squeeze=False)
    for (left,right),(task,(grid,fit,row)) in zip(axs, res.items()):
        bs = np.geomspace(grid.index[0], grid.index[-1], 100)
        left.plot(grid.index, grid.steps_to_target, 'o', label='trained, learning rate tuned')
        left.plot(bs, fit(bs), color='C0', lw=1, label='curve fitted to it')
        left.axvline(row['critical'], color='C3', ls='--', label='suggested: `critical` left, `fastest` right')
        left.set(title=f"{task}\ncritical: {row['critical']:,} suggested, {fit.critical:,.0f} fitted", ylabel='Steps to the target')
        right.plot(grid.index, grid.seconds, 'o')
        right.plot(grid.index, grid.predicted*grid.seconds.min()/grid.predicted.min(), color='C1', lw=1, label='predicted form')
        right.plot([row['fastest'],64], [row['s at fastest'],row['s at 64']], 'x', color='C3', ms=9,
                    label=f"trained at `fastest` and 64, learning rate by `{row['lr_find']}`")
        right.axvline(row['fastest'], color='C3', ls='--')
        right.set(title=f"fastest: {row['fastest']:,} suggested, {row['best']:,} found", ylabel='Seconds to the target')
        for ax in (left,right):
            ax.set_xlabel('Batch size (items)')
            log2_axis(ax.xaxis)
            log2_axis(ax.yaxis)
    handles = [h for ax in axs[0] for h in ax.get_legend_handles_labels()[0]]
    fig.legend(handles, [h.get_label() for h in handles], loc='outside upper center', ncols=2, frameon=False)
    return fig

def main():
    p = parser(__doc__, data=True, seeds=3, jobs=1)
    p.add_argument('--task', choices=tasks, help='only this one')
    args = p.parse_args()
    res = {}
    for task in [o for o in tasks if args.task in (None,o)]:
        t = tasks[task]
        swept = study(task, args.data, 'sweep', t.bss, lr=t.lr, lr_bs=64, n_seeds=args.seeds, n_jobs=args.jobs)
        fs = found(task, args.data)
        timed = speed(task, args.data, sorted({*swept.df.bs, *fs.fastest.astype(int)}))
        runs = predicted(task, args.data, fs, args.seeds)
        for f in fs.itertuples(): res[task,f.suggestion] = compare(task, f, swept, timed, runs)
        print(f"## {task}: validation loss {t.target}\n")
        table(res[task,'minimum'][0].reset_index().to_dict('records'))
    print("## Prediction and proof\n")
    table([o[-1] for o in res.values()])
    if args.task is None:
        by_valley = {k: v for (k,o),v in res.items() if o=='valley'}
        picture(by_valley).savefig(Path(__file__).parents[1]/'nbs'/'images'/'proof.png', dpi=80)

if __name__=='__main__': main()
