"""The style of the page, for light and dark screens."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --quiet: #667080; --line: #d8dee6; --paper: #f6f7f9; --card: #fff;
  --good: #1a7f4b; --good-back: #e3f5ea; --bad: #b3261e; --bad-back: #fdeceb; --learnt: #bfe8cd; --learnt2: #a5dcb9;
  --context: #eceff3; --context2: #dfe4ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --quiet: #96a0ae; --line: #343c47; --paper: #15191f;
  --card: #1c2128; --good: #5fd193; --good-back: #15301f; --bad: #ff8a80; --bad-back: #3a1b1a; --learnt: #1f5a38;
  --learnt2: #28704a; --context: #2a313b; --context2: #343d49; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px; }
header p { margin: 0; color: var(--quiet); font-size: 13px; }
h1 { margin: 0 0 20px; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 18px; }
h3 { margin: 0 0 8px; font-size: 15px; overflow-wrap: anywhere; }
h4 { margin: 12px 0 4px; font-size: 14px; }
h3 small, h4 small, .quiet { color: var(--quiet); font-weight: 400; font-size: 13px; }
section { margin-top: 24px; padding: 20px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
article + article { margin-top: 24px; padding-top: 20px; border-top: 1px solid var(--line); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.verdict { padding: 14px 18px; border-radius: 10px; font-weight: 600; }
.good { background: var(--good-back); color: var(--good); }
.bad { background: var(--bad-back); color: var(--bad); }
.bad ul { margin: 8px 0 0; padding-left: 18px; font-weight: 400; color: var(--ink); }
.bad li span { white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.tiles div { padding: 12px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles span, .tiles small { display: block; color: var(--quiet); font-size: 12px; overflow-wrap: anywhere; }
.tiles strong { display: block; font-size: 20px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { color: var(--quiet); font-weight: 500; font-size: 12px; }
th, td { padding: 5px 8px; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.last td:last-child, .numbers td:not(:first-child), .numbers th:not(:first-child) {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.plain td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12.5px; vertical-align: top; }
.plain td:last-child { color: var(--quiet); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 8px 16px; margin: 0 0 12px; }
dt { color: var(--quiet); font-size: 12px; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.lost dd, .loss { color: var(--bad); font-weight: 600; }
.loss { margin: 0 0 12px; font-weight: 400; }
svg { display: block; width: 100%; height: auto; margin: 4px 0 12px; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
.limit { stroke: var(--bad); stroke-width: 2; }
.mark { stroke: var(--quiet); stroke-dasharray: 2 3; }
.axis { stroke: var(--line); }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 8px; border-radius: 3px; }
.c0 { fill: #4c78c9; background: #4c78c9; } .c1 { fill: #e08a3c; background: #e08a3c; }
.c2 { fill: #4da66f; background: #4da66f; } .c3 { fill: #c2557b; background: #c2557b; }
.c4 { fill: #8a6cc4; background: #8a6cc4; } .c5 { fill: #3fa3a8; background: #3fa3a8; }
.c6 { fill: #b3a13a; background: #b3a13a; } .c7 { fill: #8b95a3; background: #8b95a3; }
.tokens { font: 13px/2 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.tokens span { padding: 3px 1px; margin-right: 1px; border-radius: 3px; background: var(--context); }
.tokens span:nth-of-type(even) { background: var(--context2); }
.tokens .l { background: var(--learnt); border-bottom: 2px solid var(--good); }
.tokens .l:nth-of-type(even) { background: var(--learnt2); }
.legend { margin: 0 0 14px; color: var(--quiet); font-family: inherit; white-space: normal; }
.legend span { padding: 3px 8px; margin-right: 6px; color: var(--ink); }
"""
