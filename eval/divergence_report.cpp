#include <cmath>

#include "eval/divergence.h"

namespace pare {

Json json_number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  return value;
}

Json to_json(const Estimate& estimate) {
  Json json = {{"value", json_number(estimate.value)}, {"standard_error", nullptr}};
  if (estimate.standard_error) json["standard_error"] = json_number(*estimate.standard_error);
  return json;
}

namespace {

Json to_json(const ModelScore& score) {
  return {{"name", score.name}, {"loss", pare::to_json(score.loss)}, {"perplexity", pare::to_json(score.perplexity)}};
}

Json to_json(const UnitFigures& unit, bool pair) {
  Json json = {{"document", unit.document},
               {"window", unit.window},
               {"predictions", unit.predictions},
               {"original_loss", json_number(unit.original_loss)}};
  if (!pair) return json;
  json["compressed_loss"] = json_number(unit.compressed_loss);
  json["kl"] = json_number(unit.kl);
  json["same_top1"] = unit.same_top1;
  json["kl_tail"] = Json::array();
  for (const double kl : unit.kl_tail) json["kl_tail"].push_back(json_number(kl));
  return json;
}

std::string kl_name(const DivergenceResult& result, const std::string& which) {
  return which + (result.from_cache ? "_topk_kl" : "_kl");
}

}  // namespace

Json to_json(const DivergenceResult& result) {
  Json json = {{"windows", result.windows},
               {"documents", result.documents},
               {"predictions", result.predictions},
               {"standard_errors_over", result.clusters},
               {"seconds", result.seconds},
               {"original", to_json(result.original)}};
  if (result.per != Unit::kNone) {
    Json& units = json[result.per == Unit::kDocument ? "per_document" : "per_window"] = Json::array();
    for (const UnitFigures& unit : result.units) units.push_back(to_json(unit, result.compressed.has_value()));
  }
  if (!result.compressed) return json;
  json["compressed"] = to_json(*result.compressed);
  json[kl_name(result, "mean")] = to_json(result.kl);
  json[kl_name(result, "median")] = json_number(result.kl_median);
  json[kl_name(result, "p99")] = json_number(result.kl_99);
  json[kl_name(result, "p999")] = json_number(result.kl_999);
  json[kl_name(result, "max")] = json_number(result.kl_maximum);
  if (result.from_cache) {
    json["top_k"] = result.top_k;
    json["kl_is_lower_bound"] = true;
  }
  json["top1_agreement"] = to_json(result.top1);
  json["log_perplexity_ratio"] = to_json(result.log_perplexity_ratio);
  return json;
}

void add_rows(const DivergenceResult& result, const std::string& stage, Report& report) {
  const ModelScore& original = result.original;
  const auto single = [&](const std::string& in, const std::string& metric, const Estimate& value, const char* unit) {
    report.add({in, metric, std::nullopt, value.value, unit, value.standard_error});
  };
  const std::string first = result.compressed ? "original" : stage;
  single(first, "predictions", {static_cast<double>(result.predictions), {}}, "tokens");
  single(first, "loss", original.loss, "nats/token");
  single(first, "perplexity", original.perplexity, "");
  if (!result.compressed) return;
  const ModelScore& compressed = *result.compressed;
  report.add({stage, "loss", original.loss.value, compressed.loss.value, "nats/token", compressed.loss.standard_error});
  report.add({stage, "perplexity", original.perplexity.value, compressed.perplexity.value, "",
              compressed.perplexity.standard_error});
  single(stage, "log_perplexity_ratio", result.log_perplexity_ratio, "nats/token");
  single(stage, kl_name(result, "mean"), result.kl, "nats");
  single(stage, kl_name(result, "median"), {result.kl_median, {}}, "nats");
  single(stage, kl_name(result, "p99"), {result.kl_99, {}}, "nats");
  single(stage, kl_name(result, "p999"), {result.kl_999, {}}, "nats");
  single(stage, kl_name(result, "max"), {result.kl_maximum, {}}, "nats");
  single(stage, "top1_agreement", result.top1, "share");
}

}  // namespace pare
