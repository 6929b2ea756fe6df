#include "compress/html.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace pare {
namespace {

// Series 1 to 6 are told apart by eye in both schemes (Okabe and Ito 2008, lightened for dark).
constexpr const char* kStyle =
    ":root{color-scheme:light dark;--text:#222;--soft:#666;--rule:#ddd;--back:#fff;--box:#f5f5f5;--bad:#a00;"
    "--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#a0568a;--s4:#8a6d00;--s5:#444}"
    "@media(prefers-color-scheme:dark){:root{--text:#ddd;--soft:#999;--rule:#383838;--back:#161616;--box:#222;--bad:#"
    "f77;"
    "--s0:#56b4e9;--s1:#f0883e;--s2:#2ec99c;--s3:#d893c2;--s4:#e0c040;--s5:#bbb}}"
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 "
    "1em;color:var(--text);background:var(--back)}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}th,td{padding:.2em .7em;border-bottom:1px solid var(--rule);"
    "text-align:left;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}"
    "pre{background:var(--box);padding:1em;overflow:auto}.missed{color:var(--bad);font-weight:bold}small{color:var(--"
    "soft)}"
    "figure{margin:.5em 0 1.5em}figcaption{font-weight:bold}svg{width:100%;max-width:60em;height:auto;display:block}"
    "svg text{fill:var(--soft);font:12px sans-serif}svg .g{stroke:var(--rule)}svg .l{fill:none;stroke-width:1.8}"
    ".c0{stroke:var(--s0)}.c1{stroke:var(--s1)}.c2{stroke:var(--s2)}.c3{stroke:var(--s3)}.c4{stroke:var(--s4)}"
    ".c5{stroke:var(--s5)}.m{fill:var(--back);stroke-width:1.8}";

constexpr double kWidth = 800, kHeight = 280, kLeft = 70, kRight = 14, kTop = 26, kBottom = 40;
constexpr int kColours = 6, kMostTicks = 20;

std::string fixed(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

std::string label(double value) {
  char text[32];
  const double size = std::abs(value);
  if (size >= 1e9)
    std::snprintf(text, sizeof text, "%.4gG", value / 1e9);
  else if (size >= 1e6)
    std::snprintf(text, sizeof text, "%.4gM", value / 1e6);
  else if (size >= 1e4)
    std::snprintf(text, sizeof text, "%.4gk", value / 1e3);
  else
    std::snprintf(text, sizeof text, "%.4g", value);
  return text;
}

// Whole multiples of 1, 2 or 5 times a power of ten, four to nine of them.
std::vector<double> ticks(double low, double high) {
  const double rough = (high - low) / 5, power = std::pow(10, std::floor(std::log10(rough)));
  const double step = power * (rough / power < 1.5 ? 1 : rough / power < 3.5 ? 2 : rough / power < 7.5 ? 5 : 10);
  if (!(step > 0)) return {};
  const double first = std::ceil(low / step - 1e-9), last = std::floor(high / step + 1e-9);
  std::vector<double> at;
  // Counted in whole numbers: beyond 2^53 a double plus 1 is itself.
  for (int i = 0; i < kMostTicks && first + i <= last; ++i) {
    const double value = (first + i) * step;
    if (at.empty() || value > at.back()) at.push_back(first + i == 0 ? 0 : value);
  }
  return at;
}

struct Axis {
  double low = 0, high = 1, from = 0, to = 1;  // values, and where they lie
  bool logarithmic = false;
  double place(double value) const {
    const double share = logarithmic ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return from + share * (to - from);
  }
};

}  // namespace

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string number_text(const std::optional<double>& value) {
  if (!value) return "";
  char text[48];
  const bool whole =
      *value > -1e15 && *value < 1e15 && *value == static_cast<double>(static_cast<std::int64_t>(*value));
  std::snprintf(text, sizeof text, whole ? "%.0f" : "%.6g", *value);
  return text;
}

std::string table_line(const std::vector<std::string>& cells, const char* tag, std::size_t numbers_from) {
  std::string out = "<tr>";
  for (std::size_t i = 0; i < cells.size(); ++i)
    out += std::string("<") + tag + (i >= numbers_from ? " class=n>" : ">") + escaped(cells[i]) + "</" + tag + ">";
  return out + "</tr>\n";
}

std::string rows_table(const Report& report, bool deterministic) {
  std::string out = "<table>\n" + table_line({"stage", "figure", "unit", "before", "after", "±"}, "th", 3);
  for (const ReportRow& row : report.rows()) {
    if (row.deterministic != deterministic) continue;
    out += table_line({row.stage, row.metric, row.unit, number_text(row.before), number_text(row.after),
                       number_text(row.standard_error)},
                      "td", 3);
  }
  return out + "</table>\n";
}

std::string page_begin(const std::string& title) {
  return "<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
         "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
         "<meta name=viewport content=\"width=device-width\">\n<title>" +
         escaped(title) + "</title>\n<style>" + kStyle + "</style>\n</head>\n<body>\n<h1>" + escaped(title) + "</h1>\n";
}

std::string page_end() {
  return "</body>\n</html>\n";
}

std::string line_chart(const std::string& title, const std::string& x_name, const std::string& y_name,
                       const std::vector<Series>& series, bool logarithmic) {
  Axis x{1e300, -1e300, kLeft, kWidth - kRight}, y{1e300, -1e300, kHeight - kBottom, kTop};
  const auto shown = [](const Series& s, std::size_t i) { return std::isfinite(s.x[i]) && std::isfinite(s.y[i]); };
  for (const Series& s : series)
    for (std::size_t i = 0; i < std::min(s.x.size(), s.y.size()); ++i) {
      if (!shown(s, i)) continue;
      x.low = std::min(x.low, s.x[i]);
      x.high = std::max(x.high, s.x[i]);
      y.low = std::min(y.low, s.y[i]);
      y.high = std::max(y.high, s.y[i]);
    }
  if (!(x.low < x.high) || y.low > y.high) return "";
  y.logarithmic = logarithmic && y.low > 0 && y.high > 10 * y.low;
  if (!y.logarithmic) {
    const double room = y.high > y.low ? 0.05 * (y.high - y.low) : std::max(1e-9, 0.1 * std::abs(y.high));
    const bool from_zero = y.low >= 0 && y.low < 0.3 * y.high;  // a small part is left out for no gain
    y.low = from_zero ? 0 : y.low - room;
    y.high += room;
  }
  std::string out = "<figure><figcaption>" + escaped(title) + "</figcaption>\n<svg viewBox=\"0 0 " + fixed(kWidth) +
                    " " + fixed(kHeight) + "\" role=img aria-label=\"" + escaped(title) + "\">\n";
  std::vector<double> levels;
  if (y.logarithmic) {
    for (double power = std::max(1e-300, std::pow(10, std::floor(std::log10(y.low)))); power <= y.high; power *= 10)
      for (const double part : {1.0, 2.0, 5.0})
        if (power * part >= y.low && power * part <= y.high) levels.push_back(power * part);
    if (levels.size() > 9)
      std::erase_if(levels,
                    [](double level) { return std::abs(std::log10(level) - std::round(std::log10(level))) > 1e-6; });
  } else {
    levels = ticks(y.low, y.high);
  }
  for (const double level : levels) {
    const std::string at = fixed(y.place(level));
    out += "<line class=g x1=" + fixed(kLeft) + " x2=" + fixed(kWidth - kRight) + " y1=" + at + " y2=" + at +
           " /><text x=" + fixed(kLeft - 6) + " y=" + fixed(y.place(level) + 4) + " text-anchor=end>" + label(level) +
           "</text>\n";
  }
  for (const double level : ticks(x.low, x.high))
    out += "<line class=g x1=" + fixed(x.place(level)) + " x2=" + fixed(x.place(level)) + " y1=" + fixed(kTop) +
           " y2=" + fixed(kHeight - kBottom) + " /><text x=" + fixed(x.place(level)) +
           " y=" + fixed(kHeight - kBottom + 16) + " text-anchor=middle>" + label(level) + "</text>\n";
  out += "<text x=" + fixed((kLeft + kWidth - kRight) / 2) + " y=" + fixed(kHeight - 6) + " text-anchor=middle>" +
         escaped(x_name) + "</text>\n<text x=" + fixed(kLeft) + " y=14>" + escaped(y_name) + "</text>\n";
  double legend = kWidth - kRight;
  for (std::size_t k = series.size(); k-- > 0;) {
    const Series& s = series[k];
    const std::string colour = " c" + std::to_string(k % kColours);
    std::string points, marks;
    for (std::size_t i = 0; i < std::min(s.x.size(), s.y.size()); ++i) {
      if (!shown(s, i)) continue;
      const std::string px = fixed(x.place(s.x[i])), py = fixed(y.place(s.y[i]));
      points += (points.empty() ? "" : " ") + px + "," + py;
      if (s.marks)
        marks += "<circle class=\"m" + colour + "\" cx=" + px + " cy=" + py + " r=3><title>" + escaped(s.name) + " " +
                 number_text(s.y[i]) + " at " + escaped(x_name) + " " + number_text(s.x[i]) + "</title></circle>";
    }
    out += "<polyline class=\"l" + colour + "\" points=\"" + points + "\"><title>" + escaped(s.name) +
           "</title></polyline>" + marks + "\n";
    if (series.size() < 2) continue;
    legend -= 7.0 * static_cast<double>(s.name.size()) + 34;
    out += "<line class=\"l" + colour + "\" x1=" + fixed(legend) + " x2=" + fixed(legend + 18) +
           " y1=10 y2=10 /><text x=" + fixed(legend + 23) + " y=14>" + escaped(s.name) + "</text>\n";
  }
  return out + "</svg></figure>\n";
}

}  // namespace pare
