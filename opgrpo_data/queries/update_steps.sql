-- What an update did at each denoising step, by role: one row per run, iteration, optimizer step, role and step (docs/metrics.md).
SELECT
    run_id, iteration, optimizer_step, role, step,
    count(*) AS pairs,
    avg(ratio) AS ratio_mean,
    stddev_pop(ratio) AS ratio_std,
    min(ratio) AS ratio_min,
    max(ratio) AS ratio_max,
    avg(clipped::INT) AS clip_fraction,
    avg(kl) AS kl,
    avg(path_variance) AS path_variance
FROM (
    SELECT
        run_id, iteration, optimizer_step, role,
        unnest(train_steps) AS step,
        unnest(ratio) AS ratio,
        unnest(clipped) AS clipped,
        unnest(kl) AS kl,
        unnest(path_variance) AS path_variance
    FROM {updates}
    WHERE len(ratio) > 0
)
GROUP BY ALL
ORDER BY ALL
