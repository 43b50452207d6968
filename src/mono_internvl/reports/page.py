"""The page of the report: its style sheet, and its template, which escapes all values."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1c1e22; --muted: #63676e; --line: #e3e1dc;
  --model: #2257a8; --blind: #8b8f96; --good: #17714f; --bad: #b3261e; --partly: #8a5a00;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e8e7e3; --muted: #a0a4ac; --line: #333842;
    --model: #82b1ff; --blind: #858b96; --good: #62d0a0; --bad: #ff8f86; --partly: #e3b35c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--sans); -webkit-text-size-adjust: 100%; }
main { max-width: 1020px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  margin: .2rem 0 1rem; font-weight: 680; }
h2 { font-size: 1.28rem; letter-spacing: -.01em; margin: 3.2rem 0 .5rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0; font-weight: 640; }
p { max-width: 74ch; margin: .5rem 0 1rem; }
.eyebrow { color: var(--muted); font-size: .85rem; letter-spacing: .04em; margin: 0; }
.lead { font-size: 1.06rem; }
.note, figcaption { color: var(--muted); font-size: .88rem; }
.notice { border-left: 3px solid var(--partly); padding: .4rem .9rem; background: var(--card); }
code { font-family: var(--mono); font-size: .88em; overflow-wrap: anywhere; }
.strip { display: flex; flex-wrap: wrap; gap: 1px;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  margin: 1.6rem 0 0; padding: 0; }
.strip div { background: var(--card); padding: .8rem 1rem; flex: 1 1 8.5rem; }
.strip dt { color: var(--muted); font-size: .8rem; }
.strip dd { margin: 0; font-size: 1.2rem; font-weight: 640; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
th { color: var(--muted); font-weight: 560; font-size: .84rem; vertical-align: bottom; }
tbody th { color: var(--ink); font-size: inherit; vertical-align: top; font-weight: 500; }
th:first-child, td:first-child, .words { text-align: left; }
.words { white-space: normal; }
.long { min-width: 9rem; }
th:first-child, td:first-child { padding-left: 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .partly { color: var(--partly); }
.good, .bad, .partly { font-weight: 600; }
.unknown { color: var(--muted); }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure { margin: 1rem 0; }
.narrow { display: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(212px, 1fr)); gap: 14px; }
.panel, .sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  break-inside: avoid; }
.panel { padding: .8rem .8rem .5rem; margin: 0; display: flex; flex-direction: column;
  justify-content: space-between; }
.panel p { margin: 0 0 .35rem; font-size: .78rem; color: var(--muted); line-height: 1.35; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .86rem; margin: .6rem 0 1rem; }
.key span { display: inline-flex; align-items: center; gap: .5rem; }
.key svg { width: 30px; height: 10px; flex: none; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(212px, 1fr)); gap: 14px; }
.sample { overflow: hidden; display: flex; flex-direction: column; }
.view { position: relative; background: #fff; }
.view img { display: block; width: 100%; height: auto; }
.view svg { position: absolute; inset: 0; height: 100%; }
.view rect { fill: none; vector-effect: non-scaling-stroke; }
.halo { stroke: #fff; stroke-width: 6; stroke-opacity: .9; }
.truth { stroke: #0b7a53; stroke-width: 2.6; stroke-dasharray: 7 4; }
.said { stroke: #d0490a; stroke-width: 2.6; }
.missing { padding: 2.5rem 1rem; text-align: center; color: var(--muted); font-size: .85rem;
  border-bottom: 1px solid var(--line); }
.about { padding: .7rem .85rem .85rem; font-size: .9rem; line-height: 1.4; }
.head { display: flex; justify-content: space-between; gap: .5rem; font-size: .8rem;
  margin-bottom: .4rem; color: var(--muted); }
.question { margin: 0 0 .5rem; font-weight: 560; overflow-wrap: anywhere; }
.about dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .6rem; margin: 0; }
.about dt { color: var(--muted); font-size: .8rem; line-height: 1.6; }
.about dd { margin: 0; overflow-wrap: anywhere; }
.made { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: .8rem 0;
  font-size: .92rem; }
.made dt { color: var(--muted); } .made dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
@media (max-width: 640px) {
  main { padding-top: 1.8rem; }
  .wide { display: none; } .narrow { display: block; }
  .panels, .samples { grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 10px; }
  .panel { padding: .6rem .5rem .35rem; } .panel p { font-size: .74rem; }
  .made { grid-template-columns: 1fr; gap: 0; } .made dd { margin-bottom: .6rem; }
  th, td { padding: .4rem .4rem; } .long { min-width: 7rem; } table { font-size: .85rem; }
}
@media print {
  html { font-size: 12px; } body { background: #fff; font-size: 1rem; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 1.6rem; } tr, figure { break-inside: avoid; }
  .panels, .samples { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  .view, .said, .truth { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

PAGE = """
{%- macro boxes(items, style) -%}
{% for box in items %}<rect class="{{ style }}" x="{{ box.x1 }}" y="{{ box.y1 }}" {# -#}
width="{{ box.width }}" height="{{ box.height }}"/>{% endfor %}
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; {# -#}
style-src 'unsafe-inline'; img-src data:">
<title>{{ run.name }}: {{ words.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">{{ words.title }} · {{ run.name }}</p>
<h1>{{ words.headline }}</h1>
{% if words.lead %}<p class="lead">{{ words.lead|safe }}</p>{% endif %}

{% if run.is_quick %}<p class="notice">{{ words.quick_note|safe }}</p>
{% endif %}
<dl class="strip">
{% if run.targets %}<div><dt>targets met</dt><dd class="{{ 'good' if num_met == run.targets|length
else 'bad' }}">{{ num_met }} of {{ run.targets|length }}</dd></div>{% endif %}
{% if run.targets %}<div><dt>aims reached</dt><dd>{{ num_aims }} of {{ run.targets|length }}</dd>
</div>{% endif %}
<div><dt>CPU minutes</dt><dd>{{ run.cpu_minutes|short }}</dd></div>
<div><dt>minutes by the clock</dt><dd>{{ run.minutes|short }}</dd></div>
<div><dt>device</dt><dd>{{ run.device or "–" }}{% if run.processes %} × {{
run.processes|whole }}{% endif %}</dd></div>
</dl>
</header>

<section>
<h2>Targets</h2>
{% if run.targets %}
<p>Set before the run, measured on held-out items. A missed <em>must</em> is a defect; an
<em>aim</em> is what was hoped for.</p>
<div class="scroll"><table>
<thead><tr><th>target</th><th>must</th><th>aim</th><th>value</th><th class="words">result</th></tr>
</thead><tbody>
{% for target in run.targets %}<tr><th class="words long" scope="row">{{ target.name }}</th>
<td>{{ target.must|bound(target) }}</td><td>{{ target.aim|bound(target) }}</td>
<td><strong>{{ target.value|value }}</strong></td><td class="words">
{%- if target.is_met and target.reaches_aim %}<span class="good">✓ met, and the aim</span>
{%- elif target.is_met %}<span class="good">✓ met</span>
{%- elif target.value is none %}<span class="bad">✗ not measured</span>
{%- else %}<span class="bad">✗ missed</span>{% endif %}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="note">Left out: this run has no targets.</p>{% endif %}
</section>

<section>
<h2>The stages</h2>
{% if run.stages %}
<div class="scroll"><table>
<thead><tr><th>stage</th><th class="words long">what for</th><th class="words long">what learns</th>
<th>steps</th><th>samples</th><th>CPU minutes</th></tr></thead><tbody>
{% for stage in run.stages %}<tr><th scope="row">{{ stage.label }}</th>
<td class="words">{{ stage.title or "–" }}</td><td class="words">{{ stage.trains or "–" }}</td>
<td>{{ stage.steps|whole }}</td><td>{{ stage.samples|whole }}</td>
<td>{{ stage.cpu_minutes|short }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="note">Left out: this run has no stages.</p>{% endif %}
{% if loss_wide %}
<figure><div class="wide">{{ loss_wide|safe }}</div><div class="narrow">{{ loss_narrow|safe }}</div>
<figcaption>Training loss, smoothed; the band holds 80&nbsp;% of the steps around it. Each stage has
data of its own, so levels compare within a stage, not across a dotted line.</figcaption></figure>
{% else %}<p class="note">Loss curves left out: no stage left its steps.</p>{% endif %}
</section>

<section>
<h2>What it sees</h2>
{% if panels %}
<p>Held-out images, free greedy generation. <em>Blind</em> is the same model and question with the
image at its mean colour: what lies above it was seen, not guessed.</p>
<div class="key" aria-hidden="true">
<span><svg viewBox="0 0 30 10"><path d="M0 5H30" style="stroke:var(--model);stroke-width:2.4"/>
<circle cx="15" cy="5" r="3.4" style="fill:var(--model)"/></svg>model</span>
<span><svg viewBox="0 0 30 10"><path d="M0 5H30" style="stroke:var(--blind);stroke-width:1.8;{# -#}
stroke-dasharray:7 3.5"/></svg>blind</span>
<span><svg viewBox="0 0 30 10"><path d="M0 5H30" style="stroke:var(--blind);stroke-width:1.6;{# -#}
stroke-dasharray:1.5 3"/></svg>chance</span></div>
<div class="panels">
{% for panel in panels %}<figure class="panel"><h3>{{ panel.title }}</h3><p>{{ panel.note }}</p>
{{ panel.svg|safe }}</figure>
{% endfor %}</div>
<details><summary>The same as a table</summary><div class="scroll"><table>
<thead><tr><th>kind</th>{% for label in stage_labels %}<th>{{ label }}</th>{% endfor %}
<th>blind</th><th>chance</th><th>items</th></tr></thead><tbody>
{% for row in score_rows %}<tr><th scope="row">{{ row.title }}</th>
{% for value in row.values %}<td>{{ value|value }}</td>{% endfor %}
<td>{{ row.blind|value }}</td><td>{{ row.chance|value }}</td><td>{{ row.items|whole }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">Blind, chance and items are those of the last stage that has them.</p></details>
{% else %}<p class="note">Left out: no stage was evaluated on images.</p>{% endif %}
</section>

<section>
<h2>What became of its language</h2>
{% if text_rows or has_identity %}
<p>The same text measures before and after. While the language model is frozen, text takes exactly
the path that it took before, so its logits must not change by a single bit.</p>
{% if text_panels %}<div class="panels">
{% for panel in text_panels %}<figure class="panel"><h3>{{ panel.title }}</h3>
<p>{{ panel.note }}</p>{{ panel.svg|safe }}</figure>
{% endfor %}</div>{% endif %}
<div class="scroll"><table>
<thead><tr><th>measure</th>{% for label in text_labels %}<th>{{ label }}</th>{% endfor %}</tr>
</thead><tbody>
{% for row in text_rows %}<tr><th scope="row">{{ row.title }}</th>
{% for value in row.values %}<td>{{ value|value }}</td>{% endfor %}</tr>
{% endfor %}
{% if has_identity %}<tr><th scope="row">text-only logits</th>
{% for is_identical in identical %}<td>
{%- if is_identical is none %}<span class="unknown">–</span>
{%- elif is_identical %}<span class="good">✓ identical</span>
{%- else %}<span class="partly">≠ changed</span>{% endif %}</td>
{% endfor %}</tr>{% endif %}
</tbody></table></div>
{% if has_identity %}<p class="note">Identical: bit for bit those of the starting language model.
Where the stage trains shared parts, they are expected to change.</p>{% endif %}
{% else %}<p class="note">Left out: this run measured no text.</p>{% endif %}
</section>

<section>
<h2>Samples</h2>
{% if gallery.samples %}
<p>Chosen by a fixed rule, not by hand, from {{ gallery.num_answers }} held-out answers of the model
after {{ gallery_label }}: every kind, right and wrong in proportion. Here {% for verdict in
verdicts %}{{ gallery.counts[verdict] }} {{ verdict }}{{ ", " if not loop.last }}{% endfor %};
over all answers {{ (100 * gallery.right_share)|round|int }}&nbsp;% are right{{
" (%s)"|format(words.right_note) if words.right_note }}.</p>
{% if has_boxes %}<div class="key" aria-hidden="true">
<span><svg viewBox="0 0 30 10"><path class="truth" d="M0 5H30"/></svg>true box</span>
<span><svg viewBox="0 0 30 10"><path class="said" d="M0 5H30"/></svg>the model's box</span></div>
{% else %}<p class="note">No boxes to draw: this run has no grounding samples.</p>{% endif %}
<div class="samples">
{% for sample in gallery.samples %}<article class="sample">
{% if sample.picture %}<div class="view"><img src="{{ sample.picture.uri }}" {# -#}
width="{{ sample.picture.width_px }}" height="{{ sample.picture.height_px }}" {# -#}
alt="Image the question is about">
{%- if sample.said_boxes or sample.true_boxes %}<svg viewBox="0 0 1000 1000" {# -#}
preserveAspectRatio="none" aria-hidden="true">{{ boxes(sample.true_boxes, "halo")
}}{{ boxes(sample.said_boxes, "halo") }}{{ boxes(sample.true_boxes, "truth")
}}{{ boxes(sample.said_boxes, "said") }}</svg>{% endif %}</div>
{% else %}<div class="missing">image not found</div>{% endif %}
<div class="about"><div class="head"><span>{{ sample.kind.title }}</span>
{% if sample.verdict == "right" %}<span class="good">✓ right
{%- elif sample.verdict == "wrong" %}<span class="bad">✗ wrong
{%- else %}<span class="partly">≈ partly right{% endif -%}
{%- if sample.true_boxes %}, IoU {{ "%.2f"|format(sample.score) }}
{%- elif sample.verdict == "partly right" %}, {{ "%.2f"|format(sample.score) }}{% endif -%}
</span></div>
<p class="question">{{ sample.question }}</p>
<dl><dt>model</dt><dd>{{ sample.said or "(nothing)" }}</dd>
<dt>truth</dt><dd>{{ sample.truth }}</dd></dl></div></article>
{% endfor %}</div>
{% else %}<p class="note">Left out: this run kept no answers about images.</p>{% endif %}
</section>

<section>
<h2>How it was made</h2>
<dl class="made">
<dt>command</dt><dd>{% if run.command %}<code>{{ run.command }}</code>{% else %}–{% endif %}</dd>
<dt>device</dt><dd>{{ run.device or "–" }}{% if run.processes %}, {{ run.processes|whole }}
{{ "process" if run.processes == 1 else "processes" }}{% endif %}</dd>
<dt>cost</dt><dd>{{ run.cpu_minutes|short }} CPU minutes (all processes together),
{{ run.minutes|short }} minutes by the clock</dd>
{% for name, version in run.versions.items() %}<dt>{{ name }}</dt>
<dd><code>{{ version or "–" }}</code></dd>
{% endfor %}</dl>
</section>

{% if words.limits %}<section>
<h2>What this does and does not show</h2>
<p>{{ words.limits|safe }}</p>
</section>
{% endif %}
</main>
</body>
</html>
"""
