"""Does it hold when one really trains? Six tasks (`tasks.py`), each trained by `bs_study` at many batch sizes.

The sweep: at every batch size the learning rate, constant through a run, is tuned on a grid of factors of two, with
`--seeds` seeds, for trainings to a validation loss that is fixed beforehand. Steps to the target are compared, so it may
run beside other work; `--jobs 2` makes two runs at a time.

The courses: so many epochs of one-cycle at several batch sizes and peaks of the learning rate, compared by the validation
loss at their end. `--only courses` makes only these.

The speed: seconds of a step, measured apart, in half a second of training and six steps at least, in five rounds in each of
which all batch sizes have their turn. The time to the target is steps times that, and that of a course likewise.

The recipe: `bs_find()` on five learners with batches of 64 and other weights. Then the task is trained as three of them say, to
the target and in a course; and with batches of 64 and the `valley` of `lr_find`, as people do without a recipe.

All is kept in `results/proof/`, a study in each folder, `results/proof_valley.csv` and `results/proof_recipe.csv`, and is not
repeated: remove a folder to repeat it. The sweep of a task takes under an hour, the rest a few minutes; let nothing else run
beside that. Many runs of the first four tasks were made by an older program and converted: of them only steps are known, and
`steps_to_target` is the middle of the two looks between which it lies."""
from tasks import *
from fastai_bs_finder.recorder import log2_axis
from fastai_bs_finder.stats import even_rounds
import matplotlib.pyplot as plt

n_recipes,n_trained,constant = 5,3,.7 # a constant rate is so many times the peak that a recipe gives

def folder(task, what): return RESULTS/'proof'/task.lower().replace(', ', '_')/what

def study(task, data, what, bss, lrs='tuned', **kw):
    "Trainings to the target of a task"
    t = tasks[task]
    return bs_study(
        partial(learner, task, data), bss, lrs, target=t.target, max_examples=t.max_examples, path=folder(task, what), **kw)

def courses(task, data, epochs, lrs, **kw):
    "Courses of `epochs`, at the batch sizes and peaks of the dictionary `lrs`"
    return bs_study(partial(learner, task, data), list(lrs), lrs, epochs=epochs, path=folder(task, f'courses_{epochs}'), **kw)

def all_courses(task, data, **kw):
    t = tasks[task]
    return courses(task, data, t.epochs, {int(o): list(t.peaks) for o in t.courses}, **kw)

class Enough(Callback):
    "Ends the training of an epoch after half a second"
    def before_train(self): self.start = time.perf_counter()
    def after_batch(self):
        if self.training and self.iter >= 5 and time.perf_counter()-self.start > .5: raise CancelTrainException()

def half_a_second(learn, epochs, lr): learn.fit(epochs, lr, cbs=Enough())

def speed(task, data, bss, n_rounds=5):
    "Seconds of a step by batch size; of each round, in a folder of its own"
    rounds = [bs_study(partial(learner, task, data), bss, [1e-6], epochs=1, fit=half_a_second, n_seeds=1,
                       path=folder(task, f'speed_{i}')) for i in range(n_rounds)]
    return speed_of([o.df for o in rounds])

def speed_of(dfs):
    rounds = pd.DataFrame([o.set_index('bs').step_time for o in dfs])
    return pd.Series(even_rounds(rounds.to_numpy())[0], rounds.columns)

def kept_speed(task): return speed_of([Study.load(o).df for o in sorted(folder(task, '').glob('speed_*'))])

def kept(name, task, n, make):
    "Rows of a table of results, `n` for each task; those that are missing are made by `make(i)`"
    path = RESULTS/f'{name}.csv'
    df = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=['task'])
    for i in range(int((df.task==task).sum()), n):
        df = pd.concat([df, pd.DataFrame([dict(task=task) | make(i)])], ignore_index=True)
        df.to_csv(path, index=False, float_format='%.6g')
    df = pd.read_csv(path) # as it will be read the next time
    return df[df.task==task]

def new_learner(task, data, seed, bs=64):
    set_seed(seed)
    learn = learner(task, data, bs).remove_cb(ProgressCallback)
    learn.dls.train.rng = random.Random(seed)
    return learn

def valley(task, data, seed):
    "What people do without a recipe"
    learn = new_learner(task, data, seed)
    with tempfile.TemporaryDirectory() as tmp:
        learn.path = Path(tmp)
        return dict(valley=learn.lr_find(show_plot=False).valley)

def recipe(task, data, seed):
    "What `bs_find` says, and how long it takes"
    learn,start = new_learner(task, data, seed),time.perf_counter()
    sugg = learn.bs_find(epochs=more_tasks[task].epochs, show_plot=False)
    seconds,row,race = time.perf_counter()-start,learn.recorder.settled(),learn.recorder.race
    return dict(seed=seed, **sugg._asdict(), predicted=race.predicted, noise_scale=row.noise_scale, lower=row.lower,
                upper=row.upper, lr_low=race.low, lr_high=race.high, racers=len(race.rows), seconds=seconds)

def followed(task, data, recipes, lr_64, n_seeds):
    "Trainings and courses as the recipes say, and with batches of 64 as people do"
    answers = [(int(o.fastest),o.lr,int(o.epochs)) for o in recipes.head(n_trained).itertuples()]
    lrs,E = {64: [lr_64]},tasks[task].epochs
    for bs,lr,_ in answers: lrs.setdefault(bs, []).append(constant*lr)
    to_target = study(task, data, 'followed', list(lrs), {k: sorted(set(v)) for k,v in lrs.items()}, n_seeds=n_seeds)
    by_epochs = {}
    for bs,lr,epochs in [(64,lr_64,E),*answers]: by_epochs.setdefault(epochs, {}).setdefault(bs, []).append(lr)
    def made(epochs, lrs): return courses(task, data, epochs, {b: sorted(set(o)) for b,o in lrs.items()}, n_seeds=n_seeds)
    return to_target,{k: made(k, v) for k,v in by_epochs.items()}

def rows_of(study, bs, lr): return [o for o in study.rows if o['bs']==bs and math.isclose(o['lr'], lr, rel_tol=1e-5)]

def sweep_table(sweep, step):
    "The best of the sweep at each batch size, with its time"
    grid = sweep.best()[['lr','steps_to_target','edge']].join(step.rename('step'))
    grid['examples'],grid['seconds'] = grid.index*grid.steps_to_target,grid.step*grid.steps_to_target
    return grid

def to_target(task, grid, sweep, step, recipes, lr_64, trained):
    "A row: what the recipe says, and its time to the target beside the best of the sweep and beside batches of 64"
    def seconds(bs, lr):
        failed,steps = trained.rank(rows_of(trained, bs, lr))
        return math.inf if failed else step[bs]*steps
    best,fit = grid.seconds.idxmin(),sweep.critical()
    times = [seconds(int(o.fastest), constant*o.lr) for o in recipes.head(n_trained).itertuples()]
    cost = float((sweep.df.steps*sweep.df.bs.map(step)).sum())
    return {
        'task':task, 'fastest':', '.join(f'{o:,.0f}' for o in recipes.fastest),
        'lr':', '.join(f'{o:.2g}' for o in recipes.lr), 'lr, largest/smallest':recipes.lr.max()/recipes.lr.min(),
        'best bs':int(best), 'its lr':grid.lr[best], 's at best':grid.seconds[best],
        'recipe/best':float(np.median(times)/grid.seconds[best]),
        'of each':', '.join(f'{o/grid.seconds[best]:.2f}' for o in times),
        '64 with valley/best':seconds(64, lr_64)/grid.seconds[best],
        'noise scale':', '.join(f'{o:,.0f}' for o in recipes.noise_scale),
        'fitted':f'{fit.critical:,.0f} ({fit.lower:,.0f} to {fit.upper:,.0f})',
        'call (s)':', '.join(f'{o:.0f}' for o in recipes.seconds), 'sweep (s)':cost, 'sweep/call':cost/recipes.seconds.median()}

def of_sweep(task, df):
    "Of the courses of a study, those of the sweep: there are the recipes' and those with `valley`, too"
    peak = df.lr.map(lambda o: np.isclose(o, tasks[task].peaks, rtol=1e-5, atol=0).any())
    return df[df.bs.isin([int(o) for o in tasks[task].courses]) & peak]

def in_courses(task, step, recipes, lr_64, done):
    "A row: the recipe's courses beside those with batches of 64, and beside the best of the sweep that is as fast"
    E = tasks[task].epochs
    def seconds(epochs, bs): return done[epochs].df.query('bs==@bs').steps.iloc[0]*step[bs]
    def losses(epochs, bs, lr): return [o['valid_loss'] for o in rows_of(done[epochs], bs, lr)]
    answers = [(int(o.epochs),int(o.fastest),o.lr) for o in recipes.head(n_trained).itertuples()]
    base,t_64 = losses(E, 64, lr_64),seconds(E, 64)
    mine,t = [losses(*o) for o in answers],[seconds(e, bs) for e,bs,_ in answers]
    df = of_sweep(task, done[E].df)
    df = df.groupby(['bs','lr']).valid_loss.agg(['mean','std','count']).query('count > 1').reset_index()
    def best(limit): return df[df.bs.map(lambda o: seconds(E, o)) <= 1.001*limit].sort_values('mean').head(1).to_dict('records')
    fast = [best(o) for o in t]
    def shown(v): return f'{np.mean(v):.4f} ± {np.std(v, ddof=1):.4f}'
    def config(o): return f"{o[0]['mean']:.4f} ± {o[0]['std']:.4f} ({o[0]['bs']}, {o[0]['lr']:.2g})" if o else 'none'
    return {
        'task':task, 'epochs of 64':E, '64 with valley':shown(base), 's':t_64,
        'recipe: bs, lr, epochs':'; '.join(f'{b}, {lr:.2g}, {e}' for e,b,lr in answers),
        'its loss':'; '.join(map(shown, mine)), 'times faster':', '.join(f'{t_64/o:.2f}' for o in t),
        'best as fast':'; '.join(map(config, fast))}

def peaks(task, sweep, done):
    "Rows: the best peak of a course over the best constant rate, at each batch size"
    df,const = done[tasks[task].epochs].df,sweep.best().lr
    df = of_sweep(task, df)
    means = df.groupby(['bs','lr']).valid_loss.mean().unstack()
    def row(bs, losses):
        near = min(losses.dropna().index, key=lambda o: abs(math.log(o/const[bs])))
        return {
            'task':task, 'bs':int(bs), 'best constant':const[bs], 'best peak':losses.idxmin(),
            'peak/constant':losses.idxmin()/const[bs], 'loss, best peak':losses.min(), 'loss, peak as the constant':losses[near]}
    return [row(b, o) for b,o in means.iterrows() if b in const.index]

def is_done(task):
    "Are all trainings of a task kept?"
    return folder(task, 'followed').exists() and folder(task, f'courses_{tasks[task].epochs}').exists()

def report(task):
    "From what is kept: the sweep as a table and its fit, and the rows of the three tables"
    def rows(name): return pd.read_csv(RESULTS/f'{name}.csv').set_index('task').loc[[task]]
    swept,trained = (Study.load(folder(task, o)) for o in ('sweep','followed'))
    done = {int(o.name.split('_')[1]): Study.load(o) for o in folder(task, '').glob('courses_*')}
    step = kept_speed(task)
    recipes,lr_64,grid = rows('proof_recipe'),rows('proof_valley').valley.iloc[0],sweep_table(swept, step)
    return dict(
        swept=swept, grid=grid, recipes=recipes, to_target=to_target(task, grid, swept, step, recipes, lr_64, trained),
        courses=in_courses(task, step, recipes, lr_64, done), peaks=peaks(task, swept, done))

def picture(res):
    "For each task the steps and seconds over the batch size, and what the recipe said"
    fig,axs = plt.subplots(len(res), 2, figsize=(10,3.2*len(res)), layout='constrained', squeeze=False)
    for (left,right),(task,o) in zip(axs, res.items()):
        grid,fit,row,recipes = o['grid'],o['swept'].critical(),o['to_target'],o['recipes']
        s_64 = row['64 with valley/best']*row['s at best']
        bs,mid = np.geomspace(grid.index[0], grid.index[-1], 100),recipes.iloc[0]
        left.plot(grid.index, grid.steps_to_target, 'o', label='trained, learning rate tuned')
        left.plot(bs, fit(bs), color='C0', lw=1, label='curve fitted to it')
        left.axvline(mid.noise_scale, color='C3', ls='--', label='the recipe: noise scale left, `fastest` right')
        title = f"{task}\ncritical: {mid.noise_scale:,.0f} measured, {fit.critical:,.0f} fitted"
        left.set(title=title, ylabel='Steps to the target')
        right.plot(grid.index, grid.seconds, 'o')
        best = grid.seconds.min()
        ratios = [float(o) for o in row['of each'].split(', ')]
        sizes = [*recipes.fastest.head(n_trained)]
        right.plot(sizes, [o*best for o in ratios], 'x', color='C3', ms=9, label='trained as the recipes say')
        right.plot([64], [s_64], '+', color='C1', ms=11, label='trained with 64 and `valley`')
        right.axvline(mid.fastest, color='C3', ls='--')
        right.set(title=f"fastest: {mid.fastest:,.0f} said, {row['best bs']:,} found", ylabel='Seconds to the target')
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
    p.add_argument('--only', choices=['courses'], help='only the sweep of courses')
    args = p.parse_args()
    chosen,res = [o for o in tasks if args.task in (None,o)],{}
    if args.only: return [all_courses(o, args.data, n_seeds=args.seeds, n_jobs=args.jobs) for o in chosen]
    for task in chosen:
        t = tasks[task]
        swept = study(task, args.data, 'sweep', t.bss, lr=t.lr, lr_bs=64, n_seeds=args.seeds, n_jobs=args.jobs)
        all_courses(task, args.data, n_seeds=args.seeds, n_jobs=args.jobs)
        lr_64 = kept('proof_valley', task, 1, partial(valley, task, args.data)).valley.iloc[0]
        recipes = kept('proof_recipe', task, n_recipes, partial(recipe, task, args.data))
        speed(task, args.data, sorted({*swept.df.bs, *t.courses, *recipes.fastest.astype(int)}))
        followed(task, args.data, recipes, lr_64, args.seeds)
        res[task] = report(task)
        print(f"## {task}: validation loss {t.target}\n")
        table(res[task]['grid'].reset_index().to_dict('records'))
    for title,k in (('To the target','to_target'), ('Courses','courses')):
        print(f"## {title}\n")
        table([o[k] for o in res.values()])
    print("## Peak or constant\n")
    table([row for o in res.values() for row in o['peaks']])

if __name__=='__main__': main()
