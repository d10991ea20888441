{{- define "snifctl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "snifctl.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "snifctl.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* `kubectl snif` finds an installation by name, component and instance. */ -}}
{{- define "snifctl.selector" -}}
app.kubernetes.io/name: snifctl
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "snifctl.labels" -}}
{{ include "snifctl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "snifctl.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-k8s" .Chart.AppVersion) }}
{{- end -}}
