-- Of each prompt the trajectories of highest decayed reward, out of the narrow table of opgrpo_data.index.
-- Twice over the table and no window over it: first the least reward that is enough for a prompt, then the rows that reach it.
-- Of equals the newer stays, as in select_best.sql. Ids compare as they are packed; callers order the result by their text.
-- A negative reward decays away from zero (entries.sql).
WITH aged AS (
    SELECT
        *,
        CASE $decay_form
            WHEN 'linear' THEN value - $decay * ($iteration - iteration)
            ELSE value * pow($decay, CASE WHEN value < 0 THEN iteration - $iteration ELSE $iteration - iteration END)
        END AS decayed
    FROM scored
    {usable}
),
enough AS (SELECT prompt, {least} AS least FROM aged GROUP BY prompt)
SELECT aged.* FROM aged JOIN enough USING (prompt)
WHERE decayed >= least
QUALIFY row_number() OVER (PARTITION BY prompt ORDER BY decayed DESC, iteration DESC, member, id) <= $members
