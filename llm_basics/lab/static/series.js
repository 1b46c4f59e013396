// Metrics of a run as points of curves, kept up to date from the live stream.

// the first steps of all runs are similar
const FIRST_COMPARED = 20;

export function pointsOf(buckets) {
  if (!buckets) return [];
  return buckets.last_step.map((x, i) => ({
    x, y: buckets.mean[i], lo: buckets.min[i] ?? undefined, hi: buckets.max[i] ?? undefined, seconds: buckets.seconds[i],
  }));
}

export class Series {
  constructor(series) {
    this.points = new Map(Object.entries(series).map(([name, buckets]) => [name, pointsOf(buckets)]));
    const all = [...this.points.values()].map((points) => points.at(-1)).filter(Boolean);
    const last = all.sort((a, b) => a.x - b.x).at(-1);
    this.step = last?.x ?? 0;
    this.seconds = last?.seconds ?? 0;
  }

  // lines of metrics.jsonl; `resumed` replaces what came later
  append(records) {
    for (const record of records) {
      if (record.resumed) {
        for (const [name, points] of this.points) this.points.set(name, points.filter((p) => p.x <= record.step));
        this.step = record.step;
        continue;
      }
      if (typeof record.step !== "number") continue;
      this.seconds += Math.max(0, record.step - this.step) * (record.step_seconds ?? 0);
      this.step = record.step;
      for (const [name, value] of Object.entries(record)) {
        if (name === "step" || name === "attempt" || (typeof value !== "number" && value !== null)) continue;
        if (!this.points.has(name)) this.points.set(name, []);
        this.points.get(name).push({ x: record.step, y: value, seconds: this.seconds });
      }
    }
  }

  get size() {
    return Math.max(0, ...[...this.points.values()].map((points) => points.length));
  }

  last(name) {
    return this.points.get(name)?.at(-1)?.y ?? null;
  }

  // points over the step, the tokens or the time
  over(name, axis, tokensPerStep) {
    const points = this.points.get(name) ?? [];
    if (axis === "tokens") return points.map((p) => ({ ...p, x: p.x * (tokensPerStep || 1) }));
    if (axis === "time") return points.filter((p) => p.seconds !== null).map((p) => ({ ...p, x: p.seconds }));
    return points;
  }

  lossAt(step) {
    return (this.points.get("train_loss") ?? []).findLast((p) => p.x <= step)?.y ?? null;
  }

  // the position of most recent losses relative to the band at their steps; null without losses
  isNormal(band) {
    const last = band.steps.at(-1);
    const known = (this.points.get("train_loss") ?? []).filter((p) => p.y !== null && p.x >= FIRST_COMPARED && p.x <= last).slice(-5);
    if (!known.length) return null;
    const beside = known.map(({ x, y }) => {
      const at = band.steps.findIndex((step) => step >= x);
      return { loss: y, step: x, low: band.low[at], high: band.high[at] };
    });
    const isMost = (each) => beside.filter(each).length > beside.length / 2;
    const place = isMost((p) => p.loss > p.high) ? "above" : isMost((p) => p.loss < p.low) ? "below" : "in";
    return { ...beside.at(-1), place };
  }

  secondsAt(step) {
    const points = this.points.get("train_loss") ?? [];
    return points.find((p) => p.x >= step)?.seconds ?? this.seconds;
  }
}
