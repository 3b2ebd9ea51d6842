"""The look of the data card: one style sheet, light and dark, for wide and narrow screens."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6975; --line: #e3e7ec; --card: #fff;
  --page: #f5f7f9; --accent: #0b7285; --accent-soft: #d9eff2; --amber: #9a4f00;
  --amber-soft: #fdeed9; --red: #b42b3a; --red-soft: #fbe4e6; --bar: #b9c4cf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #2c3641;
  --card: #1a222b; --page: #12181f; --accent: #4cc3d6; --accent-soft: #123b43; --amber: #f0a95a;
  --amber-soft: #43300f; --red: #f1808c; --red-soft: #451d22; --bar: #46525f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.02em; }
h2 { font-size: 20px; margin: 52px 0 4px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 30px 0 0; }
p { margin: 0 0 16px; color: var(--soft); max-width: 76ch; }
.note { font-size: 13px; margin: 8px 0 0; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; min-width: 0; }
.panel + .panel, .panel + .halves, .halves + .panel, .halves + .halves { margin-top: 14px; }
.panel > h3 { margin: 0 0 10px; }
.figures .panel, .halves .panel, .gallery .panel { margin-top: 0; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 24px; }
.figure b { display: block; font-size: 28px; letter-spacing: -.02em; line-height: 1.2; }
.figure span { color: var(--soft); font-size: 13px; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
h2 + .halves, h2 + .panel { margin-top: 12px; }
td .track { min-width: 150px; margin-left: 14px; }
.pairwise { display: grid; grid-template-columns: 1fr 1fr; gap: 0 28px; }
.pairwise .entity { grid-template-columns: 200px 1fr; }
.pairwise .strip img { width: 56px; height: 56px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .value { fill: var(--ink); font-weight: 600; }
svg .dot { fill: var(--accent); stroke: var(--card); stroke-width: 1.5; }
.key { color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.bars { list-style: none; margin: 0; padding: 0; font-size: 13px; display: grid; gap: 7px 12px;
  grid-template-columns: minmax(90px, max-content) 1fr max-content max-content; }
.bars li { display: grid; grid-column: 1 / -1; grid-template-columns: subgrid;
  align-items: center; }
.bars .value { text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
.bars .value + .soft { text-align: right; font-variant-numeric: tabular-nums; }
.track { display: block; height: 18px; border-radius: 4px; min-width: 40px; }
.fill { display: block; height: 100%; min-width: 1px; border-radius: 4px; background: var(--bar); }
.fill.accent { background: var(--accent); }
.wide .track { height: 24px; }
.wide .bars { font-size: 14px; gap: 9px 16px; }
.entity { display: grid; grid-template-columns: 270px 1fr; gap: 18px; padding: 10px 0;
  border-bottom: 1px solid var(--line); align-items: center; overflow-wrap: anywhere; }
.entity:last-child { border-bottom: 0; }
.entity .soft { font-size: 13px; line-height: 1.35; }
.strip { display: flex; gap: 6px; flex-wrap: wrap; }
.strip img { width: 84px; height: 84px; object-fit: cover; border-radius: 6px; background: #fff; }
.gallery { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-top: 10px; }
.picture { display: grid; grid-template-columns: 112px minmax(0, 1fr); gap: 16px; padding: 14px;
  align-items: start; }
.picture > img { width: 112px; height: 112px; object-fit: contain; border-radius: 6px;
  background: #fff; }
.caption { font-size: 14px; margin: 0 0 8px; color: var(--ink); overflow-wrap: anywhere; }
.caption mark { background: none; color: inherit; border-bottom: 2px solid var(--accent); }
.candidates td, .candidates th { font-size: 12px; padding: 3px 6px; border: 0; }
.candidates td:last-child { padding-right: 6px; }
.candidates td:first-child { border-radius: 5px 0 0 5px; width: 100%; line-height: 1.35;
  overflow-wrap: anywhere; }
.candidates td:last-child { border-radius: 0 5px 5px 0; }
.candidates .chosen td { background: var(--accent-soft); }
.candidates .chosen b { color: var(--accent); }
.tag { font-size: 11px; padding: 0 6px; border-radius: 8px; white-space: nowrap;
  background: var(--amber-soft); color: var(--amber); }
.tag.no { background: var(--red-soft); color: var(--red); }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
details[open] > summary { margin-bottom: 10px; }
@media (max-width: 820px) { main { padding: 24px 14px 60px; }
  .gallery, .halves, .pairwise { grid-template-columns: minmax(0, 1fr); } .panel { padding: 16px; }
  .figures { grid-template-columns: 1fr 1fr; } .entity, .pairwise .entity {
  grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) { .strip img { width: 64px; height: 64px; } h1 { font-size: 25px; }
  .picture { grid-template-columns: 76px minmax(0, 1fr); gap: 12px; }
  .picture > img { width: 76px; height: 76px; } .figure b { font-size: 23px; }
  .bars, .wide .bars { grid-template-columns: 1fr max-content max-content; gap: 10px; }
  .bars .name { grid-column: 1 / -1; } .bars li { row-gap: 1px; } td .track { display: none; } }
@media print { body { background: #fff; } .panel { break-inside: avoid; } }
"""
